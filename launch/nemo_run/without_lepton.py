"""Workaround: NeMo-Run without leptonai.

NeMo-Run 0.11.1 imports `leptonai.api.v1` whenever it is imported, for a cloud that nothing here uses.
leptonai 0.47 has no such module any more, and the versions that have it pin packages that vLLM cannot live
with, so leptonai is not installed. `install()` puts an import stand-in in its place, and does nothing where
leptonai can be imported. It can go when NeMo-Run imports its clouds lazily; `tests/test_launch.py` covers it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any


class Absent(type):
    """A class that any attribute of the missing package turns into; making one fails."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("leptonai is not installed: NeMo-Run's Lepton executor cannot be used here")


class Missing(metaclass=Absent):
    pass


class StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "leptonai":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = StandIn(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to execute."""


def install() -> None:
    try:
        usable = importlib.util.find_spec("leptonai.api.v1") is not None
    except ModuleNotFoundError:
        usable = False
    if not usable:
        sys.meta_path.insert(0, Finder())
