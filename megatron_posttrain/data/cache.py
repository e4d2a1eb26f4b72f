"""Conversations as tokens: made once by worker processes, kept as arrays on disk, mapped by every rank of a node."""

import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from tqdm import tqdm

from megatron_posttrain.data.columns import Columns
from megatron_posttrain.data.files import Located, content, lines_of, records
from megatron_posttrain.data.rows import Reader, Row, tell, tell_ignored, tell_left_out
from megatron_posttrain.data.template import Omissions, keep_started, started
from megatron_posttrain.data.tokenize import TrainOn, encode_row
from megatron_posttrain.errors import UserError
from megatron_posttrain.output import check_output

ARRAYS = {"tokens": "int32", "mask": "uint8", "lengths": "int32", "first": "int32", "counted": "int32"}
ABOUT = "about.json"
CHUNK = 250  # records that a worker gets at a time
ALONE = 8  # chunks that are encoded without workers, which take seconds to start
MOST_WORKERS = 32
MOST_WEIGHTS = 256


@dataclass(frozen=True)
class TokenizedSource:
    """The n conversations of a source, t tokens in all, end to end."""

    source: str
    tokens: np.ndarray  # [t] int32
    mask: np.ndarray  # [t] uint8, which of `weights` the token's loss is multiplied by
    lengths: np.ndarray  # [n] int32
    first: np.ndarray  # [n] int32, the first token that counts
    counted: np.ndarray  # [n] int32, tokens that count
    weights: np.ndarray  # [at most 256] float64; 0 and 1 come first
    unlearned: int  # conversations that are not here, since every turn has weight 0
    digest: str  # of all that


@dataclass
class _Chunk:
    arrays: dict[str, np.ndarray]
    weights: list[float]
    unlearned: int
    records: int
    ignored: Counter[str]
    left_out: Counter[str]


@dataclass(frozen=True)
class Encoder:
    """Records to tokens; all that the tokens depend on beside the records and the code."""

    tokenizer: Any
    columns: Columns
    omissions: Omissions
    train_on: TrainOn

    def key(self, source: str) -> str:
        """Of the bytes of the source, of this, and of the code that reads, renders and masks."""
        template = json.dumps(self.tokenizer.chat_template)
        formats = re.findall(r"strftime_now\(\s*\\?[\"'](.*?)\\?[\"']", template)
        parts = {
            "source": content(source),
            "tokenizer": [self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.special_tokens_map, template],
            "dates": [started().strftime(form) for form in formats],
            "options": [dict(self.columns), self.omissions, self.train_on],
            "code": [file.read_text() for file in sorted(Path(__file__).parent.glob("*.py"))],
            "versions": [tokenizers.__version__, transformers.__version__],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def __call__(self, chunk: list[Located]) -> _Chunk:
        reader = Reader(self.columns, "text" if self.train_on == "everything" else "sft")
        rows = (row for where, record in chunk if (row := reader.read(where, record)) is not None)
        return _Chunk(*self.encode(rows), len(chunk), reader.ignored, reader.left_out)

    def encode(self, rows: Iterable[Row]) -> tuple[dict[str, np.ndarray], list[float], int]:
        """`ARRAYS` of the rows, the weights that `mask` stands for, and how many rows have none but 0.

        Raises UserError for a row of which no token counts.
        """
        weights: dict[float, int] = {0.0: 0, 1.0: 1}
        found: dict[str, list[Any]] = {name: [] for name in ARRAYS}
        unlearned = 0
        for row in rows:
            conversation = encode_row(self.tokenizer, row, self.omissions, self.train_on)
            mask = np.array([weights.setdefault(w, len(weights)) for w in conversation.loss_mask])
            counts = np.flatnonzero(mask)
            if not len(counts):
                if not any("weight" in message for message in row.messages):
                    roles = [message["role"] for message in row.messages]
                    where = f"{row.source}: no token of an assistant in this conversation"
                    raise UserError(f"{where}; roles found: {roles}")
                unlearned += 1
                continue
            of_row = (conversation.token_ids, mask, [len(mask)], counts[:1], [len(counts)])
            for name, values in zip(ARRAYS, of_row, strict=True):
                found[name].append(np.asarray(values))
        arrays = {name: np.concatenate(parts or [[]]).astype(ARRAYS[name]) for name, parts in found.items()}
        return arrays, list(weights), unlearned


def tokenized_rows(rows: Sequence[Row], tokenizer: Any, omissions: Omissions = "refuse") -> TokenizedSource:
    """In memory, without a cache. Raises UserError for a row of which no token counts."""
    arrays, weights, unlearned = Encoder(tokenizer, {}, omissions, "all-assistant").encode(rows)
    if not len(arrays["lengths"]):
        raise UserError("every turn has weight 0" if unlearned else "no rows")
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays.values())).hexdigest()
    return TokenizedSource("rows", **arrays, weights=np.array(weights), unlearned=unlearned, digest=digest)


def tokenized(source: str, encoder: Encoder, cache: Path) -> TokenizedSource:
    """From the cache; the first process of a node that asks makes what is not there, others wait for it.

    An entry that is not as it was written, to the last bit, is made anew. Raises UserError for a bad row.
    """
    check_output(cache, "data.cache")
    folder = cache / encoder.key(source)
    for lock in (fcntl.LOCK_SH, fcntl.LOCK_EX):
        with _locked(folder.name, lock):
            if lock == fcntl.LOCK_EX and _open(folder, source) is None:
                _build(folder, source, encoder)
            if (found := _open(folder, source)) is not None:
                return found
    raise RuntimeError(f"{folder} cannot be read back; is its file system sound?")


@contextmanager
def _locked(name: str, kind: int) -> Iterator[None]:
    """Among the processes of this machine, and let go when one is killed. Not in the cache, whose file system may have
    no locks, or be shared with machines that do the same for themselves."""
    with (Path(tempfile.gettempdir()) / f"megatron_posttrain.{os.getuid()}.{name}.lock").open("w") as file:
        fcntl.flock(file, kind)
        yield


def _open(folder: Path, source: str) -> TokenizedSource | None:
    """None where it is not there, or not as it was written."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        files = {name: folder / name for name in about["digests"]}
        for name, file in files.items():
            with file.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != about["digests"][name]:
                    return None
    except (OSError, ValueError, KeyError):
        return None
    tell_left_out(source, about["left_out"])
    tell_ignored(about["ignored"])
    digest = hashlib.sha256("".join(about["digests"].values()).encode()).hexdigest()
    arrays = {name: np.memmap(files[name], dtype, mode="r") for name, dtype in ARRAYS.items()}
    weights = np.fromfile(files["weights"])
    return TokenizedSource(source, **arrays, weights=weights, unlearned=about["unlearned"], digest=digest)


def _build(folder: Path, source: str, encoder: Encoder) -> None:
    """Under the lock: the arrays of a source, all of them or none. Another machine may do the same."""
    partial = folder.with_name(f".{folder.name}.{socket.gethostname()}")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    try:
        about = _write(partial, source, encoder)
        (partial / ABOUT).write_text(json.dumps(about))
        if folder.exists():
            tell(f"{folder} was damaged; made anew")
            shutil.rmtree(folder)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(folder: Path, source: str, encoder: Encoder) -> dict[str, Any]:
    """Chunk by chunk, so that no process holds more than a few of them."""
    ignored: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    weights: dict[float, int] = {0.0: 0, 1.0: 1}
    digests = {name: hashlib.sha256() for name in (*ARRAYS, "weights")}
    every = 0.5 if sys.stderr.isatty() else 30.0  # seconds; on a terminal, in a log
    shown = {"desc": f"tokenising {Path(source).name}", "unit": " rows", "delay": 3.0, "mininterval": every}
    rows = unlearned = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in digests}
        progress = stack.enter_context(tqdm(total=lines_of(source), maxinterval=every, **shown))

        def add(name: str, values: np.ndarray) -> None:
            digests[name].update(values.data)
            files[name].write(values.data)

        for chunk in _chunks(source, encoder):
            codes = np.array([weights.setdefault(weight, len(weights)) for weight in chunk.weights])
            if len(weights) > MOST_WEIGHTS:
                raise UserError(f"{source}: more than {MOST_WEIGHTS} different weights of turns; round them")
            chunk.arrays["mask"] = codes.astype("uint8")[chunk.arrays["mask"]]
            for name in ARRAYS:
                add(name, chunk.arrays[name])
            ignored += chunk.ignored
            left_out += chunk.left_out
            unlearned += chunk.unlearned
            rows += len(chunk.arrays["lengths"])
            progress.update(chunk.records)
        add("weights", np.array(list(weights), dtype="float64"))
    if not rows:
        raise UserError(f"{source}: " + ("every turn has weight 0" if unlearned else "no rows in it"))
    hexadecimal = {name: digest.hexdigest() for name, digest in digests.items()}
    return {"digests": hexadecimal, "ignored": ignored, "left_out": left_out, "unlearned": unlearned, "source": source}


_encoder: Encoder


def _chunks(source: str, encoder: Encoder) -> Iterator[_Chunk]:
    """In the order of the records; this process reads them, workers encode them."""
    stream = iter(records(source))
    chunks = iter(lambda: list(islice(stream, CHUNK)), [])
    begin = list(islice(chunks, ALONE))
    workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    if len(begin) < ALONE or workers == 1:
        yield from map(encoder, chain(begin, chunks))
        return
    # Not forked: a copy of a process with threads may wait for a lock that none of its own holds.
    with multiprocessing.get_context("spawn").Pool(workers, _begin, (encoder, started())) as pool:
        yield from pool.imap(_encode, chain(begin, chunks))


def _begin(encoder: Encoder, moment: Any) -> None:
    global _encoder
    keep_started(moment)
    _encoder = encoder


def _encode(chunk: list[Located]) -> _Chunk:
    return _encoder(chunk)
