"""DeepSpeed's optimizers by their names."""

from glm_core.deepspeed.ops import adam

__all__ = ["adam"]
