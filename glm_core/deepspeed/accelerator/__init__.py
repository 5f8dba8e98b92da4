"""Offers the device as DeepSpeed's accelerator object (`deepspeed.accelerator`)."""

from glm_core.deepspeed.accelerator.real_accelerator import get_accelerator

__all__ = ["get_accelerator"]
