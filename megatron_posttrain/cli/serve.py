"""`serve`: vLLM's own OpenAI-compatible server on what a run left."""

import argparse
import json
import os
import sys
from pathlib import Path

from megatron_posttrain.cli.serve_filter import FILE, SafetyFilter, SafetyMiddleware
from megatron_posttrain.config.load import load_config
from megatron_posttrain.errors import UserError, nearest_file
from megatron_posttrain.rewards import load_rewards

# What vLLM 0.32 needs on CPU: no compiler, no rewound generator (rollout/vllm_fixes.py), no binding to cores.
CPU_OPTIONS = ("--enforce-eager", "--no-enable-chunked-prefill")
# Its default share of the memory, 92%, is free on no machine that does anything else
CPU_CACHE = ("--kv-cache-memory-bytes", str(4 << 30))
CPU_CACHE_OPTIONS = ("--kv-cache-memory-bytes", "--gpu-memory-util")
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("directory", metavar="DIR", help="a run's output, whose hf/ is served, or a Hugging Face directory")
    add("--adapter", action="store_true", help="the run's adapter/ on its base model, not hf/, where it is merged")
    add("--thinking", choices=("on", "off"), help="the template's enable_thinking, where a request does not say "
        "(default: the template's own)")  # fmt: skip
    add("--name", metavar="NAME", help="of the model in requests (default: the directory's)")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (default: 127.0.0.1)")
    add("--port", type=int, default=8000, help="default: 8000")
    add("--filter", metavar="FILE", help="YAML of a safety filter on what is asked and answered, streams too: "
        "patterns, classifier (a reward), hold (default: none)")  # fmt: skip
    add("--vllm", nargs=argparse.REMAINDER, default=[], metavar="OPTION", help="all that follows are options of vLLM's "
        "server, such as --max-model-len 8192 --enable-auto-tool-choice --tool-call-parser hermes")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Becomes the server: signals and the exit status are its own."""
    from megatron_posttrain.platform import platform

    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *server_options(args)]
    if platform().name == "cpu":
        command += [option for option in CPU_OPTIONS if option not in args.vllm]
        command += [] if any(option.startswith(CPU_CACHE_OPTIONS) for option in args.vllm) else CPU_CACHE
    sys.stdout.flush()
    os.execve(sys.executable, command, ENVIRONMENT | os.environ | ({FILE: args.filter} if args.filter else {}))


def server_options(args: argparse.Namespace) -> list[str]:
    """Options of vLLM's server. Raises UserError where there is nothing to serve."""
    run = Path(args.directory)
    name = args.name or run.resolve().name
    model = run if (run / "config.json").is_file() else run / "hf"
    options = ["--served-model-name", name]
    if args.adapter:
        file = run / "adapter" / "adapter_config.json"
        if not file.is_file():
            raise UserError(f"--adapter: {file} does not exist; runs with `lora:` write it")
        config = json.loads(file.read_text(encoding="utf-8"))
        model = Path(config["base_model_name_or_path"])
        options = ["--served-model-name", f"{name}-base", "--enable-lora", "--max-lora-rank", str(max(8, config["r"]))]
        options += ["--lora-modules", f"{name}={run / 'adapter'}", "--tokenizer", str(run / "hf")]
    if not (model / "config.json").is_file():
        raise UserError(f"{run}: neither a Hugging Face directory nor a run with one in hf/{nearest_file(run)}")
    if args.thinking:
        options += ["--default-chat-template-kwargs", json.dumps({"enable_thinking": args.thinking == "on"})]
    if args.filter:
        load_rewards([rules.classifier] if (rules := load_config(SafetyFilter, args.filter)).classifier else [])
        options += ["--middleware", f"{SafetyMiddleware.__module__}.{SafetyMiddleware.__name__}"]
    return ["--model", str(model), *options, "--host", args.host, "--port", str(args.port), *args.vllm]
