"""Weights of the four linears per layer as int8 or int4 codes: which rule, converted one matrix at
a time, and what a model takes on each of several devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glm_core import ops
from glm_core.config import ModelConfig, check
from glm_core.model.glm import GLM, LINEARS, Linear
from glm_core.ops.quant import dequantize, quantize, row_parts


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """How weights are quantised, and whether activations are rounded for the product."""

    bits: int = 8
    group: int = 0
    """inputs that share a scale; 0 = one scale a row, as GLM-130B"""
    activation_bits: int = 16
    """8: activations are rounded to int8 in blocks of 32 at each product"""

    def __post_init__(self) -> None:
        check(
            self,
            {
                "bits": self.bits in (4, 8) or "must be 8 or 4",
                "group": (self.group >= 0 and self.group % 32 == 0)
                or "must be 0 (one scale a row) or a multiple of 32",
                "activation_bits": self.activation_bits in (8, 16) or "must be 16 or 8",
            },
        )


class QuantizedLinear(nn.Module):
    """y = x w^T + bias through the op `quantized_linear`; everything frozen, gradients pass to x.
    Takes the place of `Linear`."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, how: Quantization) -> None:
        super().__init__()
        self.quantization = how
        codes, scale = quantize(weight, how.bits, how.group)
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def of(
        cls, codes: Tensor, scale: Tensor, bias: Tensor | None, how: Quantization
    ) -> QuantizedLinear:
        """From codes and scales as a checkpoint stores them; nothing is rounded again."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.quantization = how
        for name, value in (("weight", codes), ("scale", scale), ("bias", bias)):
            made.register_buffer(name, value)
        return made

    def forward(self, x: Tensor) -> Tensor:
        how = self.quantization
        return ops.quantized_linear(
            x, self.weight, self.scale, self.bias, how.bits, how.activation_bits
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """A change of the working dtype leaves the scales in theirs."""
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        self.scale = scale.to(self.scale.device)
        return self

    def dequantized(self) -> Tensor:
        """w [F, D] in float32."""
        return dequantize(self.weight, self.scale, self.quantization.bits, torch.float32)


class Converted(NamedTuple):
    """One matrix: what quantising did to it."""

    name: str
    error: float
    """root mean square of the change over that of the weights"""
    bytes_before: int
    bytes_after: int


def convert(model: GLM, how: Quantization) -> Iterator[Converted]:
    """Replaces the linears of `model` in place, one at a time: each float matrix is released before
    the next is touched. Raises ShapeError where a width does not fit."""
    for i, block in enumerate(model.blocks):
        yield from _convert(block, f"blocks.{i}", how)


def quantize_head(model: GLM, bits: int) -> Converted:
    """Gives the model a copy of its head in so many bits, groups of 32, activations in int8: what
    logits are made of from now on, half or a quarter to be read for each token. Embedding and loss
    stay as they are. Raises ConfigError, and ShapeError for a width that 32 does not divide."""
    head = model.head_weight
    made = QuantizedLinear(head, None, Quantization(bits=bits, group=32, activation_bits=8))
    model.head_codes = made
    return _converted("head", head, made)


def _convert(block: nn.Module, prefix: str, how: Quantization) -> Iterator[Converted]:
    for path in LINEARS:
        part, _, attribute = path.rpartition(".")
        owner = block.get_submodule(part)
        linear = getattr(owner, attribute)
        assert isinstance(linear, Linear)
        quantised = QuantizedLinear(linear.weight, linear.bias, how)
        setattr(owner, attribute, quantised)
        yield _converted(f"{prefix}.{path}", linear.weight, quantised)


def _converted(name: str, weight: Tensor, made: QuantizedLinear) -> Converted:
    change = size = 0.0
    for rows in row_parts(weight):
        part = weight[rows].detach().float()
        back = dequantize(
            made.weight[rows], made.scale[rows], made.quantization.bits, torch.float32
        )
        change += float(back.sub_(part).norm()) ** 2
        size += float(part.norm()) ** 2
    error = math.sqrt(change / size) if size else 0.0
    return Converted(name, error, weight.nbytes, made.weight.nbytes + made.scale.nbytes)


def build_quantized(
    config: ModelConfig,
    read: Callable[[str, torch.Size], Tensor],
    how: Quantization,
    dtype: torch.dtype,
) -> GLM:
    """A quantised model whose parameters come one by one from `read(name, shape)`: beside what is
    finished, at most one layer's float weights are in memory. The rest of the model is in
    `dtype`."""
    with torch.device("meta"):
        model = GLM(config)
    _fill(model, "", read, dtype, recurse=False)
    for name, part in model.named_children():
        if name != "blocks":
            _fill(part, name, read, dtype)
    for i, block in enumerate(model.blocks):
        _fill(block, f"blocks.{i}", read, dtype)
        for _ in _convert(block, f"blocks.{i}", how):
            pass
    return model


def _fill(
    module: nn.Module,
    prefix: str,
    read: Callable[[str, torch.Size], Tensor],
    dtype: torch.dtype,
    recurse: bool = True,
) -> None:
    for name, parameter in list(module.named_parameters(recurse=recurse)):
        value = read(f"{prefix}.{name}".lstrip("."), parameter.shape).to(dtype)
        owner = module.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(value, requires_grad=False))


class DeviceMemory(NamedTuple):
    """Bytes on one device of a tensor-parallel group."""

    weights: int
    cache: int

    @property
    def total(self) -> int:
        """Without activations and the runtime's own."""
        return self.weights + self.cache


def device_memory(
    config: ModelConfig, how: Quantization, devices: int, length: int, batch: int = 1
) -> DeviceMemory:
    """What inference takes on each of `devices`, 2 bytes for whatever is not quantised: heads, ffn
    and vocabulary are cut; norms, and the biases and row scales of the two products that are cut
    along their input (each shard has its own: it is quantised after the cut), are on every
    device."""
    c, d = config, config.hidden
    qkv, inner = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, c.num_heads * c.head_dim
    up = c.ffn * (1 if c.activation == "gelu" else 2)
    cut_out = _matrix(qkv / devices, d, how) + _matrix(up / devices, d, how)
    cut_in = _matrix(d, inner / devices, how) + _matrix(d, c.ffn / devices, how)
    biases = 2 * (c.qkv_bias * qkv / devices + c.linear_bias * (up / devices + 2 * d))
    norms = 2 * d * (2 if c.norm == "layer" else 1)
    per_block = norms * (4 if c.placement == "sandwich" else 2)
    tables = 2 * c.vocab * d * (1 if c.tied_head else 2) / devices
    learned = 4 * (c.max_length + 1) * d if c.positions == "learned_2d" else 0
    weights = c.num_layers * (cut_out + cut_in + biases + per_block) + tables + learned + norms
    heads = max(c.num_kv_heads / devices, 1)
    return DeviceMemory(
        round(weights), round(4 * c.num_layers * batch * length * heads * c.head_dim)
    )


def _matrix(rows: float, columns: float, how: Quantization) -> float:
    return rows * columns * how.bits / 8 + 2 * rows * (columns / how.group if how.group else 1)


def model_bytes(model: GLM) -> dict[str, Any]:
    """Bytes of the quantised linears and of everything else."""
    linears = [m for m in model.modules() if isinstance(m, (QuantizedLinear, Linear))]
    inside = sum(t.nbytes for m in linears for t in (*m.parameters(), *m.buffers()))
    everything = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    return {"linears_bytes": inside, "rest_bytes": everything - inside, "total_bytes": everything}
