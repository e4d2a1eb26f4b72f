"""Records of data files: JSON lines, JSON arrays, CSV, any of them compressed, and whatever `datasets` reads."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_posttrain.errors import UserError

Located = tuple[str, Any]  # "file:line" of a record, for messages about it, and the record

COMPRESSIONS = (".gz", ".zst")
TEXT = (".jsonl", ".json", ".ndjson", ".csv", ".txt")
TABLES = (".parquet", ".arrow")
BLANK = b"\xef\xbb\xbf \t\r\n"  # also a byte order mark
STARTS = {
    b"\x1f\x8b": "compressed by gzip without the suffix .gz", b"\x28\xb5\x2f\xfd": "compressed without the suffix .zst",
    b"BZh": "compressed by bzip2", b"\xfd7zXZ": "compressed by xz", b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"PAR1": "Parquet without the suffix .parquet", b"\xff\xfe": "UTF-16 text, and UTF-8 is read",
    b"\xfe\xff": "UTF-16 text, and UTF-8 is read", b"version https://git-lfs": "a pointer of Git LFS (`git lfs pull`)",
}  # fmt: skip


def records(source: str) -> Iterator[Located]:
    """Every record of a file, of a directory that `datasets` saved, or of a dataset known by name."""
    path = Path(source)
    suffix = _suffix(path)
    if path.is_file() and suffix not in TABLES:
        return _csv(path) if suffix == ".csv" else _json(path)
    if not path.exists() and (suffix in (*TEXT, *TABLES) or source.startswith((".", "/"))):
        raise UserError(f"{source}: no such file")
    return _dataset(source)


def content(source: str) -> str:
    """A digest of the bytes of a source's files, and of the suffixes that say how they are read."""
    path = Path(source)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if not path.exists():
        records(source)  # refuses a file that is not there
        files = [Path(file["filename"]) for file in _load(source).cache_files]
    total = hashlib.sha256(repr((path.suffixes[-2:], [file.name for file in files[1:]])).encode())
    try:
        for file in files:
            with file.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error}") from error
    return total.hexdigest()


def whole_text(path: Path) -> str:
    try:
        return b"".join(_lines(path)).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no UTF-8 text: {error}") from None


def lines_of(source: str) -> int | None:
    """How many records to expect, where that is quickly known."""
    path = Path(source)
    if path.suffix not in (".jsonl", ".ndjson"):
        return None
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _suffix(path: Path) -> str:
    """The suffix below a compression's."""
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        try:
            import pyarrow
        except ImportError:
            raise UserError(f"{path}: .zst needs the package pyarrow (it comes with datasets): install it") from None
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a file; what its compression cannot read is told with the file."""
    try:
        with _open(path) as file:
            yield from file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _json(path: Path) -> Iterator[Located]:
    lines = _lines(path)
    head = b""
    while not head.strip(BLANK):  # the first line that is not blank
        following = next(lines, None)
        if following is None:
            return
        head += following
    _check_start(path, head)
    opening = head.strip(BLANK)
    entries = opening.startswith(b"[") or _suffix(path) == ".json"
    if not entries and opening != b"{":
        yield from _json_lines(path, itertools.chain(head.splitlines(keepends=True), lines))
        return
    whole = head + b"".join(lines)
    try:
        document = json.loads(whole, parse_constant=_no_number)
    except ValueError as error:
        # A row a line in a file named .json, or lists as lines; anything else is a broken document.
        if opening in (b"[", b"{") or "Extra data" not in str(error):
            raise _malformed(path, 1, error) from None
        yield from _json_lines(path, iter(whole.splitlines(keepends=True)))
    else:
        yield from _entries(path, document) if entries else [(f"{path}:1", document)]


def _check_start(path: Path, head: bytes) -> None:
    """Refuse what is no JSON by its first bytes, or by a suffix of something else."""
    found = next((what for start, what in STARTS.items() if head.startswith(start)), None)
    if found is None and _suffix(path) in (".tsv", ".xlsx"):
        found = "a table that is no CSV"
    if found:
        allowed = ", ".join((*TEXT, *TABLES))
        raise UserError(
            f"{path}: it is {found}; allowed: {allowed}, the first ones also with {' or '.join(COMPRESSIONS)}"
        )


def _json_lines(path: Path, lines: Iterator[bytes]) -> Iterator[Located]:
    for number, line in enumerate(lines, start=1):
        if not line.strip(BLANK):
            continue
        try:
            yield f"{path}:{number}", json.loads(line.rstrip(), parse_constant=_no_number)
        except ValueError as error:
            raise _malformed(path, number, error) from None


def _no_number(name: str) -> None:
    """NaN, which pandas writes for a value that is not there."""
    return


def _malformed(path: Path, number: int, error: ValueError) -> UserError:
    where = f"{path}:{number}"
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"{where}: not UTF-8: {error.reason} at byte {error.start}")
    if isinstance(error, json.JSONDecodeError):
        return UserError(f"{path}:{number + error.lineno - 1}: malformed JSON: {error.msg} at column {error.colno}")
    return UserError(f"{where}: malformed JSON: {error}")


def _entries(path: Path, document: Any) -> Iterator[Located]:
    """Entries of an array, or of the one array in an object of texts (`{"version": ..., "examples": [...]}`)."""
    if isinstance(document, dict):
        arrays = {key: value for key, value in document.items() if isinstance(value, list | dict)}
        entries = next(iter(arrays.values()), None)
        first = entries[0] if isinstance(entries, list) and entries else None
        if len(arrays) == 1 and isinstance(first, dict) and not {"role", "from"} & set(first):
            document = entries
    if not isinstance(document, list):
        yield f"{path}:1", document
        return
    for number, entry in enumerate(document):
        yield f"{path}[{number}]", entry


def _csv(path: Path) -> Iterator[Located]:
    try:
        # The file's own line breaks: those within quotes are text.
        text = io.StringIO(b"".join(_lines(path)).decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(text, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}:{line}: malformed CSV: {error}") from None
        if record is None:
            return
        if None in record or None in record.values():
            raise UserError(f"{path}:{line}: not as many fields as the {len(reader.fieldnames or [])} of the header")
        yield f"{path}:{max(line, 2)}", dict(record)


def _dataset(source: str) -> Iterator[Located]:
    for number, record in enumerate(_load(source), start=1):
        yield f"{source}:{number}", record


def _load(source: str) -> Any:
    import datasets

    path = Path(source)
    try:
        if path.is_file():
            return datasets.load_dataset(path.suffix[1:], data_files=source, split="train")
        if (path / "state.json").exists():
            return datasets.load_from_disk(source)
        return datasets.load_dataset(source, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{source}: no such file, and `datasets` cannot load it: {error}") from error
