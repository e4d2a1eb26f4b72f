"""What files hold, as hashes: whether something changed is a matter of content, not of time."""

import hashlib
import json
import os
import time
from pathlib import Path

from megatron_posttrain.output import write_whole

FRESH_SECONDS = 2.0  # a file that changed so lately may change again without another time stamp
# What tells about a run and is no part of its result.
PASSING = ("result.json", "log.txt", "heartbeats", "tensorboard", "environment.json")


class Hashes:
    """SHA-256 of files and directories. A file is read again only when its size, time or inode is another."""

    def __init__(self, memory: Path) -> None:
        self.memory = memory
        try:
            self._known: dict[str, list[object]] = json.loads(memory.read_text())
        except (OSError, ValueError):  # only saves reading
            self._known = {}

    def of(self, path: Path) -> str:
        """Of a file's bytes, or of a directory's names and files; empty where there is nothing."""
        if path.is_dir():
            total = hashlib.sha256()
            for place, names, files in os.walk(path):
                names[:] = sorted(n for n in names if n not in PASSING and n != "__pycache__")
                for name in sorted(f for f in files if f not in PASSING):
                    file = Path(place, name)
                    total.update(f"{file.relative_to(path).as_posix()}\0{self._file(file)}\n".encode())
            return total.hexdigest()
        return self._file(path) if path.is_file() else ""

    def _file(self, file: Path) -> str:
        if not file.exists():
            return ""  # a link to nowhere
        about = file.stat()
        stamp = [about.st_size, about.st_mtime_ns, about.st_ino]
        known = self._known.get(str(file))
        if known is not None and known[:3] == stamp:
            return str(known[3])
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if time.time() - about.st_mtime > FRESH_SECONDS:
            self._known[str(file)] = [*stamp, digest]
        return digest

    def save(self) -> None:
        write_whole(self.memory, json.dumps(self._known))
