"""Says in which two parts quantised checkpoints store `attention.kv_b`, which makes the keys and
values of latent attention (model.quantize.QuantizedHeads).

Shapes: H heads, E head dim without the rotated part, U value head dim, C width of the latent."""

from __future__ import annotations

from glm_core.config import ModelConfig
from glm_core.model.quantize import HEADS

PARTS = ("keys", "values")
_WEIGHT = f".{HEADS}.weight"


def is_heads(name: str) -> bool:
    """Whether our parameter is stored in two parts where it is quantised."""
    return name.endswith(_WEIGHT)


def part_names(name: str) -> list[str]:
    """Returns the names of both parts."""
    return [f"{name.removesuffix('weight')}{part}.weight" for part in PARTS]


def part_shapes(c: ModelConfig) -> list[tuple[int, int, int]]:
    """Returns [H, C, E] of the keys, transposed, and [H, U, C] of the values."""
    keys = (c.num_heads, c.kv_latent, c.head_dim - c.rope_head_dim)
    return [keys, (c.num_heads, c.value_head_dim, c.kv_latent)]
