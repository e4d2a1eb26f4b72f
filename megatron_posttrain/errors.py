"""Errors that a user can mend: one message, no traceback, exit status 2."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """Bad input. The message says where (key, file, line), what was found and what is allowed."""

    status = 2  # of the process that it ends


class NotFiniteError(UserError):
    """NaN or infinite values where a run would train on them, or write them: it ends, and keeps what it has."""

    status = 1


class SaveError(UserError):
    """What a run made could not be written. The message says what, why, and what is left."""

    status = 1


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` when a valid name is close to `name`, else the empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def nearest_file(path: Path) -> str:
    """As `nearest`, among what lies beside `path`."""
    readable = path.parent.is_dir() and os.access(path.parent, os.R_OK)
    return nearest(path.name, (other.name for other in path.parent.iterdir())) if readable else ""
