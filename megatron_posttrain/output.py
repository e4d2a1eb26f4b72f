"""The directory that a command writes, and files in it that others read meanwhile."""

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_posttrain.errors import UserError


def check_output(directory: Path, key: str = "output", files: tuple[str, ...] = ()) -> Path:
    """The part of `directory`'s path that is there already. Makes nothing.

    Raises UserError where the directory cannot be made or written to, or one of `files` in it is a directory.
    """
    there = next(p for p in (directory.absolute(), *directory.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        what = "a link to nowhere" if there.is_symlink() and not there.exists() else "a file"
        raise UserError(f"{key}={directory}: {there} is {what}, so no directory can be made there; choose another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key}={directory}: {there} cannot be written to by this user; choose another directory")
    for name in files:
        if (directory / name).is_dir():
            raise UserError(f"{key}={directory}: {directory / name} is a directory, a file is to be written there")
    return there


def columns(rows: Sequence[Sequence[object]]) -> str:
    """A table as text: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells)
    return "\n".join("  ".join(row).rstrip() for row in padded)


def write_whole(file: Path, text: str) -> None:
    """Whoever reads the file finds all of it, or what it was before, at any time; the directory is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(file)
