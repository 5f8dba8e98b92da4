"""Judges any PyTorch program: is every operator of a training step computed right, and if not,
which one is wrong? Docs: docs/verdict.md."""

from glm_core.verdict.references import reference
from glm_core.verdict.watching import watch

__all__ = ["reference", "watch"]
