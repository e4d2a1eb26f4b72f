from megatron_posttrain.cli.main import process

if __name__ == "__main__":
    raise SystemExit(process())
