"""Draws the starting values of parameters, each from its own generator."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from glm_core.config import ModelConfig


def normal_draw(seed: int, name: str, shape: torch.Size) -> Tensor:
    """Returns standard normal values, float64, from a CPU generator of the parameter's own."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    # float64: torch's float32 draws differ between instruction sets
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def initial_value(config: ModelConfig, seed: int, name: str, shape: torch.Size) -> Tensor:
    """Returns a parameter's starting values, float64, as described at GLM.init_weights. They are a
    function of the arguments alone, whatever holds the parameter."""
    if len(shape) == 1:
        return torch.full(shape, 1.0 if name.endswith("norm.weight") else 0.0, dtype=torch.float64)
    gain = torch.ones(shape[0], *[1] * (len(shape) - 1))
    small = 1 / math.sqrt(2 * config.num_layers)
    if name.endswith(("out.weight", "down.weight")) or (
        name.endswith("up.weight") and config.placement == "deepnorm"
    ):
        gain.fill_(small)
    elif name.endswith("qkv.weight") and config.placement == "deepnorm":
        gain[-config.num_kv_heads * config.head_dim :] = small
    return normal_draw(seed, name, shape) * config.init_std * gain.double()
