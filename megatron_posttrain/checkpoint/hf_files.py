"""The files of a Hugging Face directory: safetensors read lazily, and written as a stream. A directory that is written
is there only when it is complete."""

import json
import math
import shutil
import struct
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from megatron_posttrain.checkpoint.stream import check_target, is_finite, map_file, partial_of, put_in_place, write_all
from megatron_posttrain.errors import NotFiniteError, UserError, nearest
from megatron_posttrain.models import fp8
from megatron_posttrain.models.architecture import HfConfig
from megatron_posttrain.models.weights import Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

SHARD_BYTES = 5_000_000_000
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}

TEMPLATES = "additional_chat_templates"
TOKENIZER_FILES = (  # what their names begin with
    "tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template", "spiece", TEMPLATES,
)  # fmt: skip

Tensors = Mapping[str, tuple[torch.dtype, Shape]]


class Entry(NamedTuple):
    """Where a tensor lies, or is to lie: bytes [start, stop) of `file`."""

    file: Path
    dtype: torch.dtype
    shape: Shape
    start: int
    stop: int


def has_weights(directory: Path) -> bool:
    return any((directory / name).exists() for name in (SINGLE, INDEX))


def unreadable(path: Path, error: OSError) -> UserError:
    """Why a file could not be read, in one message."""
    if path.is_symlink() and not path.exists():
        return UserError(f"{path}: dangling link to {path.readlink()}, which is not there (fetch the file again)")
    missing = isinstance(error, FileNotFoundError)
    return UserError(f"{path}: {'no such file' if missing else error.strerror}")


def read_json(path: Path) -> Any:
    """`UserError` for a missing or malformed file, with the line of the mistake."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}{line}: not valid JSON ({error})") from None


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file. `UserError` when it is missing, truncated or malformed."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if prefix == b"version ":
                raise UserError(f"{path}: a pointer of Git LFS, not the file itself; `git lfs pull` fetches it")
            if 8 + length > size:
                raise UserError(f"{path}: truncated safetensors file ({size} bytes, its header is not complete)")
            header = json.loads(file.read(length))
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError as error:
        raise UserError(f"{path}: malformed safetensors header ({error})") from None
    entries = {}
    for name, value in header.items():
        if name == "__metadata__":
            continue
        if value["dtype"] not in DTYPES:
            raise UserError(f"{path}: tensor '{name}' has the unknown dtype {value['dtype']}")
        start, stop = (8 + length + offset for offset in value["data_offsets"])
        if stop > size:
            raise UserError(f"{path}: truncated: tensor '{name}' ends at byte {stop}, the file has {size}")
        entries[name] = Entry(path, DTYPES[value["dtype"]], tuple(value["shape"]), start, stop)
    return entries


class HfReader:
    """The tensors of a directory with `model.safetensors` or an index of several files; nothing is loaded. `UserError`
    names the file and the tensor when a file of the index is missing or truncated, or the index and the files do not
    agree."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise UserError(f"{self.directory}: no such directory")
        self._maps: dict[Path, Tensor] = {}
        index = self.directory / INDEX
        if not index.exists():
            if not (self.directory / SINGLE).exists() and not (self.directory / SINGLE).is_symlink():
                other = sorted(p.name for p in self.directory.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
                found = f"; found: {', '.join(other)}; save the model with transformers to get safetensors"
                raise UserError(f"{self.directory}: has neither {SINGLE} nor {INDEX}{found if other else ''}")
            self._entries = read_header(self.directory / SINGLE)
            return
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: lacks 'weight_map'")
        if (self.directory / SINGLE).exists() and SINGLE not in weight_map.values():
            # transformers reads the single file, vLLM those of the index.
            raise UserError(f"{self.directory}: has two sets of weights, {SINGLE} and those of {INDEX}; remove one")
        headers = {name: read_header(self.directory / name) for name in sorted(set(weight_map.values()))}
        self._entries = {}
        for name, file in weight_map.items():
            if name not in headers[file]:
                raise UserError(f"{self.directory / file}: lacks tensor '{name}', which {INDEX} places there")
            self._entries[name] = headers[file][name]
        for file, entries in headers.items():
            if unlisted := sorted(set(entries) - set(weight_map)):
                raise UserError(f"{index}: lacks an entry for tensor '{unlisted[0]}', which is in {file}")

    def names(self) -> Collection[str]:
        return self._entries.keys()

    def entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise UserError(f"{self.directory}: no tensor '{name}'{nearest(name, self._entries)}")
        return self._entries[name]

    @property
    def files(self) -> set[Path]:
        return {entry.file for entry in self._entries.values()}

    @property
    def nbytes(self) -> int:
        return sum(entry.stop - entry.start for entry in self._entries.values())

    def dtype(self, name: str) -> torch.dtype:
        return self.entry(name).dtype

    def plain_dtype(self, name: str) -> torch.dtype:
        """The dtype once it is dequantised: bf16 for FP8."""
        dtype = self.dtype(name)
        return torch.bfloat16 if dtype == fp8.DTYPE else dtype

    @cached_property
    def fp8_block(self) -> tuple[int, int] | None:
        """Rows and columns of a block of FP8 weights; None where config.json speaks of none."""
        config = self.directory / "config.json"
        return fp8.block_size(read_json(config)) if config.exists() else None

    def get_slice(self, name: str) -> Tensor:
        """The tensor as a view of the file: only what is sliced out of it and copied is read."""
        entry = self.entry(name)
        if entry.file not in self._maps:
            self._maps[entry.file] = map_file(entry.file)
        data = self._maps[entry.file][entry.start : entry.stop]
        if entry.start % entry.dtype.itemsize:
            data = data.clone()  # torch views bytes as a wider dtype only where they are aligned
        return data.view(entry.dtype).view(entry.shape)


def plan_shards(
    tensors: Tensors, shard_bytes: int | None, owners: Mapping[str, int] | None = None
) -> tuple[dict[str, Entry], dict[str, bytes]]:
    """Every tensor's place, and the header of every file, before anything is written. Files are filled in order up to
    `shard_bytes` (None: 5 GB); a larger tensor has a file of its own. No file has tensors of two `owners`."""
    files: list[list[str]] = []
    for owner in sorted(set(owners.values())) if owners else [None]:
        split = split_state_dict_into_shards_factory(
            {name: kind for name, kind in tensors.items() if not owners or owners[name] == owner},
            get_storage_size=lambda kind: math.prod(kind[1]) * kind[0].itemsize,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=shard_bytes or SHARD_BYTES,
        )
        files += split.filename_to_tensors.values()
    targets, headers = {}, {}
    for number, names in enumerate(files, start=1):
        file = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            dtype, shape = tensors[name]
            stop = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data starts at a multiple of 8 bytes
        headers[file] = struct.pack("<Q", len(text)) + text
        for name in names:
            start, stop = (len(headers[file]) + offset for offset in header[name]["data_offsets"])
            targets[name] = Entry(Path(file), *tensors[name], start, stop)
    return targets, headers


class HfWriter:
    """Streams tensors, in any order, into a temporary sibling that becomes `directory` when all are there.

    A context manager: after an exception nothing is left behind. Where several processes write one directory, each
    the files of the tensors that it owns: one of them calls `begin`, then each `open`, `write` and `close_files`, and
    when all have, the first one calls `finish`.

    Args:
        tensors: dtype and shape by name, all of them, in the order of the files.
        source: a directory whose side files (tokenizer, chat template, generation config, licence) are carried along;
            Python files, and config.json's `auto_map`, only with `custom_code`.
        overwrite: replace an existing directory; without it that is a `UserError`.
        tokenizer: the directory whose tokenizer and chat template are carried in place of `source`'s.
        owners: the process that writes a tensor, by name.
    """

    def __init__(
        self, directory: Path | str, tensors: Tensors, config: HfConfig, *, source: Path | str | None = None,
        shard_bytes: int = SHARD_BYTES, custom_code: bool = False, overwrite: bool = False,
        tokenizer: Path | None = None, owners: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        self.directory, self.tokenizer, self.overwrite = Path(directory), tokenizer, overwrite
        self.partial, self.owners = partial_of(self.directory), owners
        self.config, self.custom_code = config, custom_code
        self.source = None if source is None else Path(source)
        self.targets, self.headers = plan_shards(tensors, shard_bytes, owners)
        self.missing: set[str] = set()
        self.open_files = ExitStack()
        self.files: dict[Path, Any] = {}
        if owners is None:
            self.begin()
            self.open()

    def begin(self) -> None:
        """Makes the temporary sibling, empty."""
        check_target(self.directory, self.overwrite)
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def open(self, owner: int | None = None) -> None:
        """The files of the tensors of `owner`; of all, where there are no owners."""
        self.missing = {name for name in self.targets if self.owners is None or self.owners[name] == owner}
        for file in dict.fromkeys(self.targets[name].file for name in self.targets if name in self.missing):
            self.files[file] = self.open_files.enter_context((self.partial / file).open("wb", buffering=0))
            self._write(file, 0, memoryview(self.headers[str(file)]))

    def write(self, name: str, tensor: Tensor) -> None:
        """Converts to the dtype on disk. `ValueError` for a name or shape that was not announced."""
        target = self.targets[name]
        if tuple(tensor.shape) != target.shape:
            raise ValueError(f"tensor '{name}' has shape {list(tensor.shape)}, announced was {list(target.shape)}")
        data = tensor.detach().to(device="cpu", dtype=target.dtype).contiguous()
        if not is_finite(data):
            raise NotFiniteError(
                f"{self.directory}: tensor '{name}' has NaN or infinite values as {target.dtype}; nothing is written"
            )
        self._write(target.file, target.start, memoryview(data.reshape(-1).view(torch.uint8).numpy().data))
        self.missing.discard(name)

    def _write(self, file: Path, start: int, content: memoryview) -> None:
        try:
            self.files[file].seek(start)
            write_all(self.files[file], content)
        except OSError as error:
            raise UserError(f"{self.partial / file}: {error.strerror}") from error

    def close_files(self) -> None:
        """`ValueError` when a tensor was not written."""
        if self.missing:
            first = sorted(self.missing)[0]
            raise ValueError(f"{self.directory}: tensor '{first}' was not written ({len(self.missing)} such)")
        self.open_files.close()

    def finish(self) -> None:
        """Writes index, config and side files, and puts the directory in its place."""
        write_side_files(self.partial, self.targets, self.config, self.source, self.custom_code, self.tokenizer)
        put_in_place(self.partial, self.directory)

    def discard(self) -> None:
        """What is left of the temporary sibling: nothing, when all went well."""
        self.open_files.close()
        shutil.rmtree(self.partial, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close_files()
                self.finish()
        finally:
            self.discard()


def side_file_paths(source: Path, custom_code: bool = False) -> list[Path]:
    """Tokenizer, chat template and the like; Python files only where `custom_code`. `UserError` for one that cannot
    be read: what is left out in silence is lost with the source."""
    found = []
    for path in sorted(source.iterdir()):
        weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if weights or path.name == "config.json" or path.name.startswith("."):
            continue
        if path.is_dir():
            found += [path] if path.name == TEMPLATES else []
            continue
        try:
            path.open("rb").close()
        except OSError as error:
            raise unreadable(path, error) from None
        if path.suffix != ".py" or custom_code:
            found.append(path)
    return found


def carry_side_files(source: Path, target: Path, custom_code: bool, tokenizer: Path | None = None) -> None:
    """Copies the side files of `source`; those of the tokenizer from `tokenizer`, where it is another directory."""
    found = side_file_paths(source, custom_code)
    if tokenizer is not None:
        found = [path for path in found if not is_of_tokenizer(path)]
        found += [path for path in side_file_paths(tokenizer, custom_code) if is_of_tokenizer(path)]
    for path in found:
        try:
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, target / path.name)
        except OSError as error:
            raise UserError(f"{error.filename or path}: {error.strerror}") from error


def custom_code(directory: Path) -> list[str]:
    """What of a directory is not carried along unless it is asked for: Python files, and what names them."""
    auto_map = read_json(directory / "config.json").get("auto_map")
    return sorted(path.name for path in directory.glob("*.py")) + (["config.json's auto_map"] if auto_map else [])


def is_of_tokenizer(path: Path) -> bool:
    return path.suffix == ".tiktoken" or path.name.startswith(TOKENIZER_FILES)


def write_side_files(
    directory: Path, targets: Mapping[str, Entry], config: HfConfig, source: Path | None, custom_code: bool,
    tokenizer: Path | None = None,
) -> None:  # fmt: skip
    """What a directory has beside its tensors: index, config.json and what `source` has."""
    if source is not None:
        carry_side_files(source, directory, custom_code, tokenizer)
    weight_map = {name: target.file.name for name, target in targets.items()}
    if SINGLE not in weight_map.values():
        total = sum(target.stop - target.start for target in targets.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    kept = {key: value for key, value in config.items() if custom_code or key != "auto_map"}
    write_json(directory / "config.json", kept)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
