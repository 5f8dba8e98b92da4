"""Checkpoints of every family member: read, merged, cut and written by one table of layouts."""

from glm_core.pretrained.weights.layouts import LAYOUTS
from glm_core.pretrained.weights.reading import Checkpoint, open_checkpoint
from glm_core.pretrained.weights.writing import convert, target

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "convert",
    "open_checkpoint",
    "target",
]
