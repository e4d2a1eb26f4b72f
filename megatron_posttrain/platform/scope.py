"""Scoped, reversible replacements of module attributes."""

import contextlib
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

Replacement = tuple[ModuleType | type, str, Any]
_ABSENT = object()


@contextlib.contextmanager
def replaced(replacements: Iterable[Replacement]) -> Iterator[None]:
    """Sets attributes for the length of the scope."""
    undo: list[Replacement] = []
    try:
        # All of them first: making them may import modules, which must see torch whole.
        for owner, name, value in list(replacements):
            undo.append((owner, name, vars(owner).get(name, _ABSENT)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(undo):
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def without_transformer_engine() -> Iterator[Replacement]:
    """megatron-core 0.16.1's MLA believes that Transformer Engine is there when its own import of it fails."""
    import megatron.core.transformer.multi_latent_attention as mla

    yield mla, "HAVE_TE", False
