"""The cache of tokens: what it holds, when it is used, and that nothing half-made or damaged is trusted."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_posttrain.data import cache
from megatron_posttrain.data.cache import ARRAYS, Encoder, tokenized
from megatron_posttrain.data.dataset import TokenizedDataset
from megatron_posttrain.data.tokenize import encode_conversation
from megatron_posttrain.errors import UserError
from tests.helpers.chat_tokenizers import CHATML, CHATML_MARKED, byte_tokenizer, turns

ROWS = [
    [
        *turns("q" * (1 + i % 5), "a" * (1 + 7 * i % 40), "again?"),
        {"role": "assistant", "content": "yes", "weight": (0, 0.25, 1, 2)[i % 4]},
    ]
    for i in range(60)
]
ENCODER = Encoder(byte_tokenizer(CHATML), {}, "refuse", "all-assistant")


def write(file: Path, rows=ROWS) -> str:
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(file)


def arrays(found) -> dict[str, list]:
    return {name: getattr(found, name).tolist() for name in (*ARRAYS, "weights")}


def test_tokens_and_masks_are_those_of_the_rows(tmp_path):
    found = tokenized(write(tmp_path / "a.jsonl"), ENCODER, tmp_path / "cache")
    data = TokenizedDataset([found], 200)
    assert len(data) == len(ROWS)
    for i, row in enumerate(ROWS):
        assert data[i] == encode_conversation(ENCODER.tokenizer, row)
    assert sorted({w for i in range(60) for w in data[i].loss_mask}) == [0, 0.25, 1, 2]
    assert found.counted.sum() == sum(w != 0 for i in range(60) for w in data[i].loss_mask)


def test_a_second_start_reads_no_row_and_any_difference_another_entry(tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl")
    first = tokenized(file, ENCODER, tmp_path / "cache")
    copy = shutil.copy(file, tmp_path / "b.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(cache, "records", None)
        assert arrays(tokenized(copy, ENCODER, tmp_path / "cache")) == arrays(first)
    encoders = [
        Encoder(byte_tokenizer(CHATML_MARKED), {}, "refuse", "all-assistant"),
        Encoder(byte_tokenizer(CHATML, [("a", "a")]), {}, "refuse", "all-assistant"),
        Encoder(ENCODER.tokenizer, {}, "allow", "all-assistant"),
        Encoder(ENCODER.tokenizer, {}, "refuse", "last-assistant"),
        Encoder(ENCODER.tokenizer, {"messages": "turns"}, "refuse", "all-assistant"),
    ]
    keys = {encoder.key(file) for encoder in (ENCODER, *encoders)}
    monkeypatch.setattr(cache.transformers, "__version__", "0")
    keys |= {ENCODER.key(file), ENCODER.key(write(tmp_path / "c.jsonl", ROWS[1:]))}
    assert len(keys) == 8


@pytest.mark.parametrize("harm", ["flip", "cut", "about", "missing"])
def test_a_damaged_entry_is_made_anew(tmp_path, caplog, harm):
    file = write(tmp_path / "a.jsonl")
    whole = arrays(tokenized(file, ENCODER, tmp_path / "cache"))
    (folder,) = (tmp_path / "cache").iterdir()
    harmed = folder / ("about.json" if harm == "about" else "mask")
    content = bytearray(harmed.read_bytes())
    content[len(content) // 2] ^= 2
    if harm == "missing":
        harmed.unlink()
    else:
        harmed.write_bytes(content if harm == "flip" else content[: len(content) // 2])
    with caplog.at_level(logging.WARNING):
        assert arrays(tokenized(file, ENCODER, tmp_path / "cache")) == whole
    assert caplog.text.count("was damaged; made anew") == 1
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [folder.name]


def test_a_bad_row_leaves_nothing_behind(tmp_path):
    file = write(tmp_path / "a.jsonl", [*ROWS, turns("q", "a"), [{"role": "assistant", "content": "x", "weight": -1}]])
    with pytest.raises(UserError, match=r"a\.jsonl:62: messages\[0\]\.weight must be a number of at least 0, found -1"):
        tokenized(file, ENCODER, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_killed_while_writing_then_built_once_by_many(tmp_path):
    """Workers make what one process makes, to the last bit; a killed one leaves nothing that is trusted."""
    rows = [turns("q" * (1 + i % 5), f"{i} " * 9) for i in range(2300)]
    file, place = write(tmp_path / "a.jsonl", rows), tmp_path / "cache"
    command = [sys.executable, "-m", "tests.helpers.cache_worker", file, str(place)]
    killed = subprocess.Popen(command)
    while not any(part.stat().st_size for part in place.glob(".*/tokens")):
        assert killed.poll() is None
        time.sleep(0.01)
    workers = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    (partial,) = place.iterdir()
    assert partial.name.startswith(".")
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [json.loads(process.communicate()[0]) for process in both]
    assert sorted(x["built"] for x in said) == [0, 1]
    assert [entry.name.startswith(".") for entry in place.iterdir()] == [False]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "ALONE", 100)  # chunks
        alone = tokenized(file, ENCODER, tmp_path / "other")
    assert {x["digest"] for x in said} == {alone.digest}
    left = [Path(f"/proc/{worker}/cmdline") for worker in workers]
    assert workers
    assert not [process for process in left if process.exists() and "spawn_main" in process.read_text()]
