from megatron_posttrain.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
