"""Judges any PyTorch program: is every operator of a training step computed right, and if not,
which one is wrong? Docs: docs/verdict.md."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm_core.verdict.graphs import eager
    from glm_core.verdict.references import reference
    from glm_core.verdict.watching import watch

__all__ = ["eager", "reference", "watch"]


def __getattr__(name: str) -> Any:
    """Imports what needs torch when it is first used; the command's own process needs none."""
    where = {"eager": "graphs", "reference": "references", "watch": "watching"}.get(name)
    if where is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"glm_core.verdict.{where}"), name)
