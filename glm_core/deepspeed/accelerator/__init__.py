"""Offers the device as DeepSpeed's accelerator object (`deepspeed.accelerator`)."""

from glm_core.deepspeed.accelerator.real_accelerator import (
    get_accelerator,
    is_current_accelerator_supported,
)

__all__ = ["get_accelerator", "is_current_accelerator_supported"]
