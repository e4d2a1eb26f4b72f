"""Transformer Engine's layers on CPU: its own Python code, its kernels replaced by torch's operations."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

SITE = Path(sys.prefix) / "transformer_engine"  # where tools/setup.sh puts its Python code: on nobody's path

needs_transformer_engine = pytest.mark.skipif(
    not SITE.exists(), reason=f"no Transformer Engine in {SITE}; `bash tools/setup.sh` puts it there"
)
