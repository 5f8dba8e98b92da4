"""The one GLM, its published sizes and its initial weights."""

from glm_core.model.glm import GLM
from glm_core.model.presets import PRESETS, preset

__all__ = ["GLM", "PRESETS", "preset"]
