"""`deepspeed.ops`: optimizers under DeepSpeed's names."""

from glm_core.deepspeed.ops import adagrad, adam, lamb, lion

__all__ = ["adagrad", "adam", "lamb", "lion"]
