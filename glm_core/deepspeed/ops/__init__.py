"""Offers optimizers under DeepSpeed's names (`deepspeed.ops`)."""

from glm_core.deepspeed.ops import adagrad, adam, lamb, lion

__all__ = ["adagrad", "adam", "lamb", "lion"]
