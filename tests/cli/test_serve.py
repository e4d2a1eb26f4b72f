"""`serve`: what vLLM's server is started with, held against its own parser; and what is refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from megatron_posttrain.cli.main import main
from megatron_posttrain.cli.serve import CPU_OPTIONS, add_arguments, server_options


def options(*line: str) -> list[str]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return server_options(parser.parse_args(line))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name in ("hf", "adapter"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "base").mkdir()
    for place in ("run/hf", "base"):
        (tmp_path / place / "config.json").write_text("{}")
    config = {"base_model_name_or_path": str(tmp_path / "base"), "r": 4}
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "run"


def test_vllm_knows_the_options(run: Path) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    line = [*options(str(run), "--thinking", "off", "--vllm", "--max-model-len", "64"), *CPU_OPTIONS]
    args = parser.parse_args(line)
    assert (args.model, args.served_model_name, args.max_model_len) == (str(run / "hf"), ["run"], 64)
    assert args.default_chat_template_kwargs == {"enable_thinking": False}
    assert args.enforce_eager
    assert args.enable_chunked_prefill is False
    args = parser.parse_args(options(str(run), "--adapter"))
    assert (args.model, args.tokenizer, args.enable_lora) == (str(run.parent / "base"), str(run / "hf"), True)
    assert [(m.name, m.path) for m in args.lora_modules] == [("run", str(run / "adapter"))]
    assert options(str(run / "hf"), "--name", "x")[:4] == ["--model", str(run / "hf"), "--served-model-name", "x"]


@pytest.mark.parametrize(
    ("line", "message"), [(["nowhere"], "nowhere: neither"), (["hf", "--adapter"], "runs with `lora:` write it")]
)
def test_refused(
    line: list[str], message: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run)
    assert main(["serve", *line]) == 2
    assert message in capsys.readouterr().err
