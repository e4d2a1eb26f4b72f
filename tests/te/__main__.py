"""python -m tests.te MODULE ARGUMENTS: runs a module as `python -m` does, with Transformer Engine's layers on CPU."""

from __future__ import annotations

import runpy
import sys

from tests.te.install import install

install()
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
