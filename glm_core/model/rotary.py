"""Computes the angles of rotary position embedding: plain, or stretched for longer texts.

Shapes: B batch, L sequence, G position rows that are rotated, P pairs of rotated dimensions per
row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glm_core import dispatch
from glm_core.config import ModelConfig


def rotary_angles(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cos and sin [B, L, G, P] float32 of the angles position * frequency, in float32 as
    transformers does;  positions [B, 2, L]. YaRN's attention factor multiplies both. In an exact
    session a CPU computes them: other devices have other powers, sines and cosines."""
    if dispatch.session().exact and not positions.is_cpu:
        cos, sin = rotary_angles(config, positions.cpu())
        return cos.to(positions.device), sin.to(positions.device)
    rows = 2 if config.positions == "rope_2d" else 1
    used = positions[:, :rows].transpose(1, 2)[..., None]  # [B, L, G, 1]
    if config.rope_scaling == "dynamic":
        inverse = _dynamic(config, positions[:, 0].amax(1) + 1)  # [B, 1, 1, P]
    else:
        inverse = frequencies(config, positions.device)  # [P]
    angles = used.float() * inverse  # [B, L, G, P]
    cos, sin = angles.cos(), angles.sin()
    if config.rope_attention_factor == 1:
        return cos, sin
    return cos * config.rope_attention_factor, sin * config.rope_attention_factor


def frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Returns the frequencies [P] float32: base^(-2i/d) for d rotated dimensions per position row,
    scaled as the config says. Dynamic scaling, which needs a length, is left out."""
    inverse = 1.0 / _base_powers(config, config.rope_base, device)
    if config.rope_scaling == "linear":
        inverse = inverse / config.rope_factor
    elif config.rope_scaling == "yarn":
        inverse = _yarn(config, inverse)
    elif config.rope_scaling == "llama3":
        inverse = _llama3(config, inverse)
    return inverse.half().float() if config.rope_float16 else inverse


def _base_powers(config: ModelConfig, base: float | Tensor, device: torch.device) -> Tensor:
    dim = config.rotary_dim
    exponent = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    powers: Tensor = base**exponent
    return powers


def _dynamic(config: ModelConfig, length: Tensor) -> Tensor:
    """Returns the frequencies [B, 1, 1, P] of dynamic NTK scaling for rows of these lengths [B]:
    the base grows once a row is longer than the model was trained for (transformers,
    _compute_dynamic_ntk_parameters). A row's length is its last position + 1, so that a row never
    depends on its neighbours."""
    factor, trained, dim = config.rope_factor, config.rope_original_length, config.rotary_dim
    growth = factor * length.clamp(min=trained) / trained - (factor - 1)
    base = config.rope_base * growth ** (dim / (dim - 2))
    return 1.0 / _base_powers(config, base[:, None, None, None], length.device)


def _yarn(config: ModelConfig, inverse: Tensor) -> Tensor:
    """Returns YaRN's frequencies (Peng et al. 2023, eq. 23): pairs that turn often over the trained
    length stay, pairs that turn seldom are slowed by the factor, with a linear ramp between."""

    def pair(rotations: float) -> float:
        turns = config.rope_original_length / (rotations * 2 * math.pi)
        return config.rotary_dim * math.log(turns) / (2 * math.log(config.rope_base))

    low, high = pair(config.rope_high_rotations), pair(config.rope_low_rotations)
    if config.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rotary_dim - 1)
    if low == high:
        high += 0.001  # transformers' guard against a division by zero
    index = torch.arange(len(inverse), device=inverse.device, dtype=torch.float32)
    slowed = ((index - low) / (high - low)).clamp(0, 1)
    return inverse / config.rope_factor * slowed + inverse * (1 - slowed)


def _llama3(config: ModelConfig, inverse: Tensor) -> Tensor:
    """Returns Llama 3.1's frequencies: as YaRN's, with a ramp over the rotations themselves
    (transformers, _compute_llama3_parameters)."""
    low, high = config.rope_low_rotations, config.rope_high_rotations
    rotations = config.rope_original_length * inverse / (2 * math.pi)
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * inverse / config.rope_factor + kept * inverse
