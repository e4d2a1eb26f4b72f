"""tools/publish.py: the model card and the list of what would go to the hub; nothing is sent."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import yaml

from tools import publish


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run leaves, as far as a card is about it; its base model is one of the hub."""
    files = {
        "run/hf/config.json": "{}", "run/hf/model.safetensors": "weights", "run/hf/README.md": "of before",
        "run/metrics.jsonl": '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.25, "kl": null, "tokens": 4096}\n',
        "data/train.jsonl": '{"prompt": "?"}', "eval/evaluation.json": json.dumps(
            {"data": "/x/gsm8k.jsonl", "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6}
        ),
        "run/config.yaml": yaml.safe_dump({
            "model": {"path": "Qwen/Qwen3-0.6B"}, "output": str(tmp_path / "run"),
            "data": {"train": [{"path": str(tmp_path / "data" / "train.jsonl"), "weight": 2}, "org/dataset"]},
        }),
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path / "run"


def test_a_dry_run_prints_the_card_and_sends_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(*more: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["publish.py", str(run), "--license", "mit", *more])
        return publish.main(), "".join(capsys.readouterr())

    monkeypatch.setattr(publish, "upload", lambda *_: pytest.fail("it was sent"))
    status, said = start("--evaluation", str(run.parent / "eval"), "--upload", "me/model", "--dry-run")
    assert status == 0
    assert (run / "hf" / "README.md").read_text() == "of before"
    _, head, card = said.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "license": "mit", "language": ["en"], "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["megatron_posttrain"], "base_model": "Qwen/Qwen3-0.6B",
    }  # fmt: skip
    contents = {"model.safetensors": b"weights", "config.json": b"{}", "train.jsonl": b'{"prompt": "?"}'}
    digests = {name: hashlib.sha256(text).hexdigest() for name, text in contents.items()}
    for name, digest in digests.items():
        assert f"| {name} | " in card
        assert digest in card
    assert "Last step: step 2, loss 1.25, tokens 4,096" in card
    assert "| org/dataset | - | no local file |" in card
    assert "0.500 +- 0.100" in card
    assert str(run.parent) not in card.split("## Evaluation")[0]  # no directory of this machine in the recipe
    assert "9  bytes in 2 files and README.md, for me/model" in card
    assert start() == (0, f"{run / 'hf' / 'README.md'}: {len((run / 'hf' / 'README.md').read_text()):,} characters\n"
                       "              2  config.json\n              7  model.safetensors\n"
                       "              9  bytes in 2 files and README.md, for no repository\n")  # fmt: skip
    assert (run / "hf" / "README.md").read_text().startswith("---\nlicense: mit\n")
    status, said = start("--adapter")
    assert status == 2
    assert "adapter: no model of a run there" in said
