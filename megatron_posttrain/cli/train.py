"""`sft`, `grpo`, ...: a config file, overrides, and the algorithm's function."""

import argparse
import os

from megatron_posttrain.config.algorithms import ALGORITHMS, GrpoConfig
from megatron_posttrain.config.load import describe, load_config, to_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command = parser.get_default("command")
    parser.add_argument("--config", metavar="FILE", help="YAML file; its `defaults: [base.yaml]` are read first")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--profile", metavar="STEPS", help="the same as logging.profile=STEPS")
    if ALGORITHMS[command].rows == "prompts":
        parser.add_argument("--replay", metavar="DIR", help="the same as rollout.replay=DIR")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="take precedence over the file")
    parser.epilog = "\n".join(
        [
            "Runs under torchrun on one or many nodes, or alone as one process:",
            f"  torchrun --nproc-per-node 4 -m megatron_posttrain {command} --config FILE parallel.tensor=2",
            "",
            "configuration (key = default):",
            *describe(ALGORITHMS[command].config),
        ]
    )


def run(args: argparse.Namespace) -> int:
    algorithm = ALGORITHMS[args.command]
    options = {"logging.profile": args.profile, "rollout.replay": getattr(args, "replay", None)}
    given = [f"{key}={value}" for key, value in options.items() if value is not None]
    config = load_config(algorithm.config, args.config, [*args.overrides, *given])
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    if config.samples:
        # Before torch: it sets what vLLM and OpenMP read from the environment at their import.
        import megatron_posttrain.rollout  # noqa: F401
    from megatron_posttrain.training.process import finish, quiet_libraries

    quiet_libraries()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if isinstance(config, GrpoConfig) and rank >= ranks - config.rollout_ranks:
        from megatron_posttrain.algorithms.rollout_ranks import serve

        status = serve(config)
    else:
        status = algorithm.load()(config)
    finish(status)
    return status
