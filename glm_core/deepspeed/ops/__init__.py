"""DeepSpeed's optimizers by their names."""

from glm_core.deepspeed.ops import adagrad, adam, lamb, lion

__all__ = ["adagrad", "adam", "lamb", "lion"]
