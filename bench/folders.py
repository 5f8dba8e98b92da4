"""Makes checkpoints with random values for benches, part by part: no tensor is in memory whole."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from glm_core.config import ModelConfig
from glm_core.model.glm import GLM
from glm_core.model.quantize import Quantization, heads_quantization
from glm_core.pretrained.weights import heads
from glm_core.pretrained.weights.files import safetensors_header
from glm_core.pretrained.weights.reading import is_linear

DRAWN = 1 << 22
"""random values, repeated in every tensor"""
Entry = tuple[str, torch.dtype, tuple[int, ...]]


def write(
    folder: Path, config: ModelConfig, bits: int = 0, group: int = 0, activation_bits: int = 16
) -> None:
    """Writes a checkpoint of layout glm-core in bfloat16, its linears quantised if bits are
    given."""
    folder.mkdir(parents=True)
    described = {"model_type": "glm-core", **dataclasses.asdict(config)}
    how = None
    if bits:
        how = Quantization(bits=bits, group=group, activation_bits=activation_bits)
        described |= {"quantization_bit": bits, "quantization_activation_bits": activation_bits}
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    with torch.device("meta"):
        model = GLM(config)
    entries = [
        e for name, p in model.named_parameters() for e in _entries(name, p.shape, config, how)
    ]
    drawn = torch.randn(DRAWN)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(safetensors_header(entries, {"format": "pt"}))
        for entry in entries:
            for part in _values(*entry, drawn, bits):
                file.write(part.view(torch.uint8).numpy().data)


def _entries(
    name: str, shape: tuple[int, ...], config: ModelConfig, how: Quantization | None
) -> Iterator[Entry]:
    """Yields what is stored for a parameter."""
    if how is None or not (is_linear(name) or heads.is_heads(name)):
        yield name, torch.bfloat16, tuple(shape)
        return
    parts = {name: tuple(shape)}
    if heads.is_heads(name):
        parts = dict(zip(heads.part_names(name), heads.part_shapes(config), strict=True))
    for key, (*rows, columns) in parts.items():
        group = heads_quantization(columns, how).group
        yield key, torch.int8, (*rows, columns * how.bits // 8)
        yield key + "_scale", torch.float16, (*rows, columns // group) if group else tuple(rows)


def _values(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], drawn: Tensor, bits: int
) -> Iterator[Tensor]:
    """Yields a tensor's values, piece after piece."""
    count, std = math.prod(shape), shape[-1] ** -0.5
    if name.endswith("_scale"):
        piece = torch.full((DRAWN,), 1 / 64 / 2**bits, dtype=dtype)
    elif dtype == torch.int8:
        piece = (drawn * 60).clamp(-127, 127).to(dtype)
    elif len(shape) == 1:
        piece = torch.full((count,), float(name.endswith("norm.weight")), dtype=dtype)
    else:
        piece = (drawn * std).to(dtype)
    while count:
        yield piece[:count]
        count -= min(count, len(piece))
