"""Checkpoints of every family member: read, merged, cut and written by one table of layouts."""

from glm_core.model.weights.layouts import LAYOUTS
from glm_core.model.weights.reading import Checkpoint, open_checkpoint
from glm_core.model.weights.writing import convert, target

__all__ = [
    "LAYOUTS", "Checkpoint", "convert", "open_checkpoint", "target",
]  # fmt: skip
