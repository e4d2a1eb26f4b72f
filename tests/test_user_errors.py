"""Bad input is refused before any model is built: one message, exit status 2, no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_posttrain.cli.main import main
from tests.helpers.models import make_assets


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_assets(tmp_path_factory.mktemp("errors"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `sft` says when it exits with status 2."""
    assert main(["sft", *arguments]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.startswith("error: ")
    return captured.err


def base(assets: Path, tmp_path: Path, **changed: str) -> list[str]:
    keys = {
        "model.path": str(assets / "model"),
        "data.train": str(assets / "train.jsonl"),
        "output": str(tmp_path / "out"),
        "training.steps": "1",
        "data.sequence_length": "64",
    } | changed
    return [f"{k}={v}" for k, v in keys.items()]


def test_unknown_key_names_the_nearest(capsys: pytest.CaptureFixture[str], assets: Path, tmp_path: Path) -> None:
    text = refused(capsys, *base(assets, tmp_path), "optimizer.learning_rat=1")
    assert "unknown key 'optimizer.learning_rat'" in text
    text = refused(capsys, *base(assets, tmp_path), "parallel.tensr=2")
    assert "'parallel.tensr'; did you mean 'tensor'?" in text
    assert "expert_tensor" in text


def test_bad_value(capsys: pytest.CaptureFixture[str], assets: Path, tmp_path: Path) -> None:
    text = refused(capsys, *base(assets, tmp_path), "optimizer.schedule=cosin")
    assert "'optimizer.schedule'" in text
    assert "'cosine'" in text
    assert "'cosin'" in text


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stf"]) == 2
    assert "did you mean 'sft'?" in capsys.readouterr().err


def test_config_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "does not exist" in refused(capsys, "--config", str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("model: [\n")
    assert "bad.yaml: not valid YAML" in refused(capsys, "--config", str(tmp_path / "bad.yaml"))


def test_missing_data_file(capsys: pytest.CaptureFixture[str], assets: Path, tmp_path: Path) -> None:
    assert "nowhere.jsonl" in refused(capsys, *base(assets, tmp_path, **{"data.train": "nowhere.jsonl"}))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"messages": [', "malformed JSON"),
        ('{"messages": [{"role": "user", "content": "1+1="}]}', "assistant"),
        ('{"text": "1+1=2"}', "text"),
    ],
)
def test_bad_row_has_its_line(
    capsys: pytest.CaptureFixture[str], assets: Path, tmp_path: Path, line: str, said: str
) -> None:
    good = (assets / "train.jsonl").read_text().splitlines()[:2]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*good, line]) + "\n")
    text = refused(capsys, *base(assets, tmp_path, **{"data.train": str(file)}))
    assert f"{file}:3" in text
    assert said in text


def copy_model(assets: Path, tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    for file in (assets / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    return model


def test_tokenizer_without_chat_template(capsys: pytest.CaptureFixture[str], assets: Path, tmp_path: Path) -> None:
    model = copy_model(assets, tmp_path)
    (model / "chat_template.jinja").unlink()
    assert "chat template" in refused(capsys, *base(assets, tmp_path, **{"model.path": str(model)}))


@pytest.mark.parametrize("what", ["missing", "misshapen", "truncated"])
def test_broken_checkpoint(capsys: pytest.CaptureFixture[str], assets: Path, tmp_path: Path, what: str) -> None:
    model = copy_model(assets, tmp_path)
    file = model / "model.safetensors"
    tensors = load_file(file)
    if what == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        name = "model.layers.1.self_attn.q_proj.weight"
        del tensors[name]
        if what == "misshapen":
            tensors[name] = torch.zeros(64, 128)
        save_file(tensors, file)
    text = refused(capsys, *base(assets, tmp_path, **{"model.path": str(model)}))
    assert "model.safetensors" in text if what == "truncated" else "layers.1.self_attn.q_proj.weight" in text
    if what == "misshapen":
        assert "[64, 128]" in text
        assert "[128, 128]" in text


def test_unsupported_model(capsys: pytest.CaptureFixture[str], assets: Path, tmp_path: Path) -> None:
    model = copy_model(assets, tmp_path)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    text = refused(capsys, *base(assets, tmp_path, **{"model.path": str(model)}))
    assert "mamba2" in text
    assert "qwen3_moe" in text


def test_layout_that_does_not_divide(
    capsys: pytest.CaptureFixture[str], assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    text = refused(capsys, *base(assets, tmp_path, **{"parallel.tensor": "3"}))
    assert "8 ranks are not divisible by tensor x pipeline x context = 3 x 1 x 1 = 3" in text
    assert "4 attention heads are not divisible by tensor=3" in text
    assert "Nearest layouts that work on 8 ranks: tensor=2 data=4" in text
    text = refused(capsys, *base(assets, tmp_path), "parallel.pipeline=8")
    assert "2 layers do not fill pipeline x virtual_pipeline = 8 chunks" in text
    assert "Nearest layouts that work on 8 ranks: pipeline=4 " in text


def test_batch_that_does_not_divide(
    capsys: pytest.CaptureFixture[str], assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    text = refused(capsys, *base(assets, tmp_path), "training.global_batch_size=6")
    assert "nearest: 4 or 8" in text


def test_every_conversation_too_long(capsys: pytest.CaptureFixture[str], assets: Path, tmp_path: Path) -> None:
    text = refused(capsys, *base(assets, tmp_path, **{"data.sequence_length": "8"}))
    assert "data.sequence_length" in text
    assert "truncate" in text


def test_fp8_without_transformer_engine(capsys: pytest.CaptureFixture[str], assets: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert "Transformer Engine" in refused(capsys, *base(assets, tmp_path), "precision.fp8=blockwise")
