"""Workaround: NeMo-Run without leptonai.

NeMo-Run 0.11.1 imports `leptonai.api.v1` whenever it is imported, for a cloud that nothing here uses.
leptonai 0.47 has no such module any more, and the versions that have it pin packages that vLLM cannot live
with. `install()` lets an import stand-in answer for what is missing of leptonai, and only for that. It can go
when NeMo-Run imports its clouds lazily; `tests/launch/test_launch.py` covers it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
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
        raise RuntimeError("not in the installed leptonai, if any: NeMo-Run's Lepton executor cannot be used")


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
    """Last in the order of finders, so that a leptonai which has the module is used as it is."""
    sys.meta_path.append(Finder())
