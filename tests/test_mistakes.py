"""Mistakes that users make, each with the one message that it gets: before any model is built, status 2, no traceback.

`python -m tests.test_mistakes` prints them as a table.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
from safetensors.torch import load_file, save_file

from megatron_posttrain.cli.main import main
from tests.helpers.models import make_assets

ROOT = Path(__file__).resolve().parent.parent
GOOD = '{"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}'
PLAN = ["plan", "--gpus", "8", "--sequence-length", "4096", "--global-batch-size", "64"]


@dataclass(frozen=True)
class Mistake:
    """`line` is what is typed: a command, or a script with its arguments; {place} is where `make_place` put things.

    `said`: parts of the message, such as where it is, what was found, what is allowed.
    """

    what: str
    line: str
    said: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def _sft(what: str, arguments: str, *said: str, **environment: str) -> Mistake:
    return Mistake(what, f"sft {arguments}", said, environment)


def _grpo(what: str, arguments: str, *said: str, **environment: str) -> Mistake:
    return Mistake(what, f"grpo {arguments}", said, environment)


MISTAKES = (
    # ---- configuration
    _sft("key of a wrong name", "optimizer.learning_rat=1", "unknown key 'optimizer.learning_rat'", "allowed under",
        "lr"),
    _sft("key of another section", "parallel.lr=1", "'parallel.lr'", "did you mean 'optimizer.lr'?"),
    _sft("key with a typing error", "parallel.tensr=2", "'parallel.tensr'", "did you mean 'tensor'?"),
    _sft("value that is none of the choices", "optimizer.schedule=cosin", "optimizer.schedule", "'cosine'", "'cosin'"),
    _sft("text for a number", "training.global_batch_size=many", "training.global_batch_size", "integer", "'many'"),
    _sft("negative size", "training.micro_batch_size=-1", "training.micro_batch_size", "greater than 0", "-1"),
    _sft("override without a value", "optimizer.lr", "override 'optimizer.lr'", "key.sub=value"),
    Mistake("no data", "sft model.path={place}/model output={place}/out", ("key 'data' is missing", "data.train")),
    Mistake("config file that is not there", "sft --config {place}/god.yaml",
        ("god.yaml does not exist", "did you mean 'good.yaml'?")),
    Mistake("config file that is no YAML", "sft --config {place}/bad.yaml", ("bad.yaml: not valid YAML", "line 3")),
    _sft("target that no module has", "lora.targets=[q_proj,k_prj]", "lora.targets", "'k_prj'",
        "did you mean 'k_proj'?", "all-linear"),
    _sft("quantisation that is not there", "lora.quantization=int4", "lora.quantization", "'nf4'", "int4"),
    _sft("FP8 without its library", "precision.fp8=blockwise", "precision.fp8=blockwise", "Transformer Engine",
        "fp8=null"),
    _grpo("key that the command ignores", "data.overlong=truncate", "data.overlong", "would be ignored", "remove it"),
    Mistake("training key for `score`", "score {usual} optimizer.lr=1", ("optimizer.lr", "would be ignored")),
    # ---- data
    _sft("data file that is not there", "data.train={place}/nowhere.jsonl", "nowhere.jsonl"),
    _sft("source of weight 0", "data.train=[{{path:\\ {place}/train.jsonl,weight:\\ 0}}]", "'data.train'", "above 0"),
    Mistake("mixture for pairs", "dpo {usual} data.train=[{{path:\\ a,weight:\\ 1}}]",
        ("'data.train'", "ignored by dpo")),
    Mistake("tokens of pairs", "dpo {usual} data.train_on=everything", ("'data.train_on'", "would be ignored")),
    _sft("broken line", "data.train={place}/broken.jsonl", "broken.jsonl:2", "JSON"),
    _sft("row of no known form", "data.train={place}/text.jsonl", "text.jsonl:2", "text"),
    _sft("row without an answer to learn", "data.train={place}/asked.jsonl", "asked.jsonl:1", "assistant"),
    _sft("rows longer than allowed", "data.sequence_length=8", "data.sequence_length", "longest has", "truncate"),
    _sft("conversation beyond the positions",
        "model.path={place}/short data.train={place}/long.jsonl data.sequence_length=2048",
        "a conversation has", "the model has 512 positions", "data.sequence_length=512"),
    _grpo("prompt that ends with the answer", "data.train={place}/answered.jsonl", "answered.jsonl:1", "user's turn"),
    _grpo("problem without `answer`", "data.train={place}/asked.jsonl", "asked.jsonl:1", "`answer`", "'math'"),
    # ---- layouts and batches
    _sft("tensor ranks that do not divide", "parallel.tensor=3", "8 ranks", "3 x 1 x 1", "tensor=2 data=4",
        WORLD_SIZE="8"),
    _sft("more tensor ranks than key-value heads", "parallel.tensor=4", "2 key-value heads", "tensor=2",
        WORLD_SIZE="4"),
    _sft("more stages than layers", "parallel.pipeline=8", "2 layers", "pipeline=4", WORLD_SIZE="8"),
    _sft("experts that do not divide", "parallel.expert=3", "8 experts", "expert=3", "data=3", WORLD_SIZE="3"),
    _sft("batch that does not divide", "training.global_batch_size=6", "global batch of 6", "4 or 8", WORLD_SIZE="4"),
    # ---- checkpoints
    _sft("model that is not there", "model.path={place}/modle", "model.path", "modle", "did you mean 'model'?"),
    _sft("hub id that was not fetched", "model.path=Qwen/Qwen3-8B", "model.path", "Qwen/Qwen3-8B", "hf download"),
    _sft("model without a tensor", "model.path={place}/missing", "model.norm.weight"),
    _sft("file that is cut short", "model.path={place}/cut", "model.safetensors"),
    _sft("family that is not supported", "model.path={place}/mamba", "mamba2", "qwen3_moe"),
    _sft("model without a tokenizer", "model.path={place}/wordless", "wordless", "tokenizer.json"),
    _sft("Git LFS pointer for a file", "model.path={place}/pointer", "model.safetensors", "git lfs pull"),
    _sft("pickled weights only", "model.path={place}/pickled", "pytorch_model.bin", "safetensors"),
    _sft("an adapter for a model", "model.path={place}/adapter", "holds an adapter", "tools/merge_adapter.py"),
    _sft("a file for a model", "model.path={place}/model/config.json", "is a file; name its directory"),
    _sft("more experts a token than there are", "model.path={place}/greedy model.random_init=true",
        "num_experts_per_tok is 99", "1 to its"),
    _sft("export that would replace its source", "model.path={place}/run/hf output={place}/run", "replace its hf/"),
    _sft("schedule that rises", "optimizer.min_lr=1", "min_lr=1.0 is above lr"),
    _sft("tokenizer without a template", "model.path={place}/bare", "chat template"),
    # ---- rollouts
    _grpo("one sample a prompt", "rollout.samples_per_prompt=1 training.global_batch_size=2",
        "rollout.samples_per_prompt=1", "2 or more"),
    _grpo("no room for a prompt", "rollout.max_tokens=64", "data.sequence_length=64", "rollout.max_tokens=64"),
    _grpo("sequences beyond the positions", "model.path={place}/short data.sequence_length=1024",
        "data.sequence_length=1024", "512 positions"),
    _grpo("cache too small for a sequence", "rollout.kv_cache_gib=0.00001", "rollout.kv_cache_gib", "one sequence"),
    _grpo("head size that vLLM has not", "model.path={place}/heads model.random_init=true", "head size of 24",
        "32, 48"),
    _grpo("width that vLLM's experts have not", "model.path={place}/widths model.random_init=true", "32",
        "found a hidden"),
    _grpo("offload in fp32", "rollout.offload=true", "rollout.offload", "precision.dtype bf16", "fp32"),
    _grpo("engine ranks that do not divide", "rollout.tensor=3", "rollout.tensor=3", "1 ranks"),
    _grpo("batch that does not divide the samples", "training.global_batch_size=3", "training.global_batch_size=3",
        "= 4"),
    _grpo("reward of a wrong name", "rewards=[{{name:\\ mth}}]", "'mth'", "did you mean 'math'?"),
    _grpo("reward file that is not there", "rewards=[{{name:\\ a,\\ file:\\ none.py}}]", "none.py", "no such file"),
    # ---- launching
    Mistake("unknown command", "stf", ("no command 'stf'", "did you mean 'sft'?")),
    _sft("interface that is not there", "", "GLOO_SOCKET_IFNAME=eth99", "lo", GLOO_SOCKET_IFNAME="eth99"),
    _sft("interface that NCCL cannot find", "", "NCCL_SOCKET_IFNAME=ib7", "no network interface",
        NCCL_SOCKET_IFNAME="ib7"),
    # ---- plan, doctor, evaluate
    Mistake("model that plan does not know", "{plan} --gpu H100 --model qwen3-30b-a4b", ("'Qwen3-30B-A3B'", "known:")),
    Mistake("GPU that plan does not know", "{plan} --gpu H10 --model qwen3-8b", ("--gpu H10", "did you mean 'H100'?")),
    Mistake("FP8 on a GPU without", "{plan} --gpu A100 --model qwen3-8b --precision fp8", ("A100 has no FP8", "bf16")),
    Mistake("layout key of a wrong name", "{plan} --gpu H100 --model qwen3-8b --layout tensr=2", ("'tensor'",)),
    Mistake("option of another task", "{plan} --gpu H100 --model qwen3-8b --offload", ("--offload", "--task grpo",
        "sft")),
    Mistake("engine that does not divide", "{plan} --gpu H100 --model qwen3-8b --task grpo --rollout-tensor 3",
        ("--rollout-tensor", "3 does not divide", "8")),
    Mistake("cluster that is none", "doctor --config {place}/good.yaml --assume H100", ("--assume 'H100'", "8xH100")),
    Mistake("overrides without a config", "doctor parallel.tensor=2", ("parallel.tensor=2", "--config FILE")),
    Mistake("output below a file", "evaluate {evaluated} --output {place}/bad.yaml/run", ("--output",
        "bad.yaml is a file")),
    Mistake("responses beyond the positions", "evaluate {evaluated} --max-tokens 600 --model {place}/short",
        ("--max-tokens 600",
        "allows 512")),
    Mistake("engine ranks that do not divide", "evaluate {evaluated} --tensor 2", ("--tensor 2", "1 processes")),
    # ---- tools
    Mistake("source that is not there", "tools/convert_hf_to_megatron.py --hf {place}/none --megatron {place}/m",
        ("none",)),
    Mistake("target that is there", "tools/convert_hf_to_megatron.py --hf {place}/model --megatron {place}/cut",
        ("cut", "--overwrite")),
    Mistake("Hugging Face directory as Megatron's",
        "tools/convert_megatron_to_hf.py --megatron {place}/model --hf {place}/h",
        ("model",)),
    Mistake("nothing to compare", "tools/compare_checkpoints.py {place}/model {place}/none", ("none",)),
)  # fmt: skip


def make_place(directory: Path) -> Path:
    """A good model with data, and copies with one thing wrong each."""
    place = make_assets(directory)

    def copy(name: str, config: dict[str, object] | None = None) -> Path:
        shutil.copytree(place / "model", place / name)
        if config:
            file = place / name / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return place / name

    tensors = load_file(place / "model" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, copy("missing") / "model.safetensors")
    cut = copy("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    copy("mamba", {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]})
    (copy("bare") / "chat_template.jinja").unlink()
    (copy("wordless") / "tokenizer.json").unlink()
    (copy("pointer") / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    pickled = copy("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text("{}")
    copy("greedy", {"num_experts_per_tok": 99})
    (place / "run").mkdir()
    copy("run/hf")
    copy("short", {"max_position_embeddings": 512})
    copy("heads", {"head_dim": 24})
    copy("widths", {"hidden_size": 72})
    asked = '{"messages": [{"role": "user", "content": "1+1="}]}'
    long = GOOD.replace("1+1=", "1+1=" * 200)
    rows = {
        "broken": [GOOD, '{"messages": ['], "text": [GOOD, '{"text": "1+1=2"}'], "long": [GOOD, long],
        "answered": [GOOD.replace("]}", '], "answer": "2"}')], "asked": [asked, asked],
    }  # fmt: skip
    for name, lines in rows.items():
        (place / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (place / "bad.yaml").write_text("model: {path: x}\ndata: [\n")
    (place / "good.yaml").write_text(f"model: {{path: {place}/model}}\ndata: {{train: x}}\noutput: {place}/out\n")
    return place


def _words(mistake: Mistake, place: Path) -> list[str]:
    """The line's words; the usual arguments first, so that the mistake takes precedence."""
    usual = {
        "sft": f"model.path={place}/model data.train={place}/train.jsonl output={place}/out training.steps=1 "
        "data.sequence_length=64",
        "grpo": f"model.path={place}/model data.train={place}/rl.jsonl output={place}/out training.steps=1 "
        "data.sequence_length=64 rollout.max_tokens=16 rollout.prompts_per_step=2 rollout.samples_per_prompt=2 "
        "training.global_batch_size=4 precision.dtype=fp32",
    }
    names = {"place": place, "usual": usual["sft"], "plan": " ".join(PLAN)}
    names["evaluated"] = f"--model {place}/model --data {place}/rl.jsonl --max-tokens 9"
    words = [w.replace("\0", " ") for w in mistake.line.format(**names).replace("\\ ", "\0").split()]
    whole = "--config" in words or "is missing" in mistake.said[0]
    if words[0] in usual and not whole:
        words[1:1] = usual[words[0]].split()
    return words


def _script(path: str) -> Callable[[], int]:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def make(mistake: Mistake, place: Path) -> tuple[int, str]:
    """(exit status, what it says on stderr)."""
    words = _words(mistake, place)
    run: Callable[[], int] = lambda: main(words)  # noqa: E731
    if words[0].endswith(".py"):
        run = _script(words[0])
    err, out = io.StringIO(), io.StringIO()
    launched = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    environment = launched | {"WORLD_SIZE": "1"} | mistake.environment
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(sys, "argv", words),
        contextlib.redirect_stderr(err),
        contextlib.redirect_stdout(out),
    ):
        status = run()
    return status, err.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("mistakes"))


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.what.replace(" ", "-"))
def test_one_message(mistake: Mistake, place: Path) -> None:
    status, said = make(mistake, place)
    assert status == 2, said
    assert said.startswith("error: ")
    assert "Traceback" not in said
    assert [part for part in mistake.said if part not in said] == [], said


def _table(mistakes: Sequence[Mistake]) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory:
        place = make_place(Path(directory))
        yield "| mistake | typed | message |\n|---|---|---|"
        for mistake in mistakes:
            said = make(mistake, place)[1].removeprefix("error: ").strip()
            text = " ".join(said.replace(str(place), "...").replace("|", "\\|").split())
            names = {"place": "...", "usual": "...", "plan": "plan ...", "evaluated": "..."}
            yield f"| {mistake.what} | `{mistake.line.format(**names)}` | {text} |"


if __name__ == "__main__":
    for line in _table(MISTAKES):
        print(line, flush=True)
