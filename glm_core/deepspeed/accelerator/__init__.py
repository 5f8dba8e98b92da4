"""`deepspeed.accelerator`: the device under DeepSpeed's name."""

from glm_core.deepspeed.accelerator.real_accelerator import get_accelerator

__all__ = ["get_accelerator"]
