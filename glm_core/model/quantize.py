"""Quantises the linear layers of each block to int8 or int4, one matrix at a time, and counts
the memory that a model takes on each of several devices.

Shapes: D input width, F output width."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glm_core import ops
from glm_core.config import ModelConfig, check, require_dense
from glm_core.errors import ShapeError
from glm_core.model.glm import GLM, QUANTIZED, GroupedLinear, HeadsLinear, Linear, head_matrices
from glm_core.ops.quant import dequantize, quantize, row_parts

HEADS = "attention.kv_b"
"""the layer that is quantised in two parts"""
VALUE_BYTES = 2
"""size of a value that is not quantised: bfloat16 or float16"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """How weights are quantized, and whether activations are rounded for the product."""

    bits: int = 8
    group: int = 0
    """inputs that share a scale; 0 = one scale per row, as GLM-130B"""
    activation_bits: int = 16
    """8: every product rounds its activations to int8, in blocks of 32"""

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
    """y = x w^T + bias by the op `quantized_linear`, in place of `Linear`. All of it is frozen;
    gradients pass to x."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, quantization: Quantization) -> None:
        super().__init__()
        self.quantization = quantization
        codes, scale = codes_of(weight, quantization)
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def of(
        cls, codes: Tensor, scale: Tensor, bias: Tensor | None, quantization: Quantization
    ) -> QuantizedLinear:
        """Builds the layer from codes and scales as a checkpoint stores them, without rounding
        again."""
        quantized = cls.__new__(cls)
        nn.Module.__init__(quantized)
        quantized.quantization = quantization
        for name, value in (("weight", codes), ("scale", scale), ("bias", bias)):
            quantized.register_buffer(name, value)
        return quantized

    def forward(self, x: Tensor) -> Tensor:
        quantization = self.quantization
        return ops.quantized_linear(
            x, self.weight, self.scale, self.bias, quantization.bits, quantization.activation_bits
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Keeps the dtype of the scales when the working dtype changes."""
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves _apply untyped
        self.scale = scale.to(self.scale.device)
        return self

    def dequantized(self) -> Tensor:
        """Returns w [F, D] in float32, or [X, F, D] of experts."""
        return values_of(self.weight, self.scale, self.quantization.bits, torch.float32)


class QuantizedGroupedLinear(QuantizedLinear):
    """The same in place of `GroupedLinear`, by the op `quantized_grouped_linear`."""

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:  # type: ignore[override]  # the rows of each expert come with it
        q = self.quantization
        return ops.quantized_grouped_linear(
            rows, self.weight, self.scale, counts, q.bits, q.activation_bits
        )


class QuantizedHeads(nn.Module):
    """In place of `HeadsLinear`: codes of each head's matrix of keys, transposed as queries are
    multiplied by it, and of values."""

    def __init__(self, keys: QuantizedLinear, values: QuantizedLinear) -> None:
        """keys [H, C, E - R] and values [H, U, C], of all heads, as QuantizedGroupedLinear."""
        super().__init__()
        self.keys, self.values = keys, values

    @classmethod
    def of(cls, linear: HeadsLinear, how: Quantization) -> QuantizedHeads:
        """Quantises the matrices of a linear layer."""
        parts = split_heads(linear.weight, linear.widths, how)
        return cls(*(QuantizedGroupedLinear(w, None, each) for w, each in parts))

    def forward(self, x: Tensor) -> Tensor:
        """Maps latents [B, L, C] to keys and values [B, L, H (E - R + U)]; only a call without a
        cache needs it."""
        both = join_heads(self.keys.dequantized(), self.values.dequantized())
        return ops.linear(x, both.to(x.dtype))

    def to_latent(self, q: Tensor) -> Tensor:
        """Maps queries as `HeadsLinear.to_latent` does."""
        return _by_head(self.keys, q)

    def from_latent(self, y: Tensor) -> Tensor:
        """Maps sums as `HeadsLinear.from_latent` does."""
        return _by_head(self.values, y)


def _by_head(linear: nn.Module, x: Tensor) -> Tensor:
    """Maps x [B, L, H, D] to [B, L, H, F], each head by its own matrix."""
    if x.shape[:2] == (1, 1):  # one token: nothing has to be rearranged
        alone: Tensor = linear(x[0, 0], torch.ones(x.shape[2], dtype=torch.long, device=x.device))
        return alone[None, None]
    heads = x.shape[2]
    rows = x.flatten(0, 1).transpose(0, 1)  # [H, B L, D]
    counts = torch.full((heads,), rows.shape[1], device=x.device)
    y: Tensor = linear(rows.flatten(0, 1), counts).unflatten(0, (heads, -1))  # [H, B L, F]
    return y.transpose(0, 1).unflatten(0, x.shape[:2])


def split_heads(
    weight: Tensor, widths: tuple[int, int], how: Quantization
) -> list[tuple[Tensor, Quantization]]:
    """Returns the two parts that `QuantizedHeads` keeps of a weight of `HeadsLinear`, and how each
    is quantised."""
    keys, values = head_matrices(weight, widths)
    parts = (keys.transpose(1, 2), values)
    return [(w, heads_quantization(w.shape[-1], how)) for w in parts]


def join_heads(keys: Tensor, values: Tensor) -> Tensor:
    """Returns the weight [H (E - R + U), C] of both parts, keys [H, C, E - R] and values [H, U, C],
    in floating point."""
    return torch.cat((keys.transpose(1, 2), values), 1).flatten(0, 1)


def heads_quantization(width: int, how: Quantization) -> Quantization:
    """Returns how a head's matrix of this input width is quantised: groups that do not divide it
    become groups of 32, or one scale a row."""
    if not how.group or width % how.group == 0:
        return how
    return dataclasses.replace(how, group=0 if width % 32 else 32)


def codes_of(weight: Tensor, how: Quantization) -> tuple[Tensor, Tensor]:
    """Returns codes and scales of a matrix [F, D], or of the matrices [X, F, D] of experts."""
    leading = weight.shape[:-1]
    codes, scale = quantize(weight.flatten(0, -2), how.bits, how.group)
    return codes.unflatten(0, leading), scale.unflatten(0, leading)


def values_of(codes: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Returns what `codes_of` stands for."""
    leading = codes.shape[:-1]
    rows = math.prod(leading)
    flat = dequantize(codes.flatten(0, -2), scale.reshape(rows, -1), bits, dtype)
    return flat.unflatten(0, leading)


class Converted(NamedTuple):
    """The effect of quantising one matrix."""

    name: str
    error: float
    """root mean square of the weights' change, divided by that of the weights"""
    bytes_before: int
    bytes_after: int


def convert(model: GLM, quantization: Quantization) -> Iterator[Converted]:
    """Replaces the linear layers of `model` in place, one at a time: each float matrix is released
    before the next is read. Raises ShapeError for a width that does not fit, before it begins."""
    if undivided := undivided_widths(model.config, quantization):
        raise ShapeError(undivided)
    for i, block in enumerate(model.blocks):
        yield from _convert(block, f"blocks.{i}", quantization)


def undivided_widths(config: ModelConfig, how: Quantization) -> str:
    """Returns which widths of a model cannot be quantized so and what to do, "" if all can."""
    c, multiple = config, how.group or 8 // how.bits  # a byte holds 8 // bits codes
    heads = ("value_head_dim", c.value_head_dim) if c.kv_latent else ("head_dim", c.head_dim)
    widths = {"hidden": c.hidden, f"num_heads * {heads[0]}": c.num_heads * heads[1], "ffn": c.ffn}
    shared = c.num_shared_experts * c.expert_ffn
    widths |= {"expert_ffn": c.expert_ffn, "all shared experts' ffn": shared}
    widths |= {"q_latent": c.q_latent, "kv_latent": c.kv_latent}
    undivided = [f"{k}={v}" for k, v in widths.items() if v % multiple]
    plain = c.head_dim - c.rope_head_dim
    if c.kv_latent and how.bits == 4 and plain % 2:
        undivided.append(f"head_dim - rope_head_dim={plain}")
    groups = f"groups of {how.group}" if how.group else "rows"
    if not undivided:
        return ""
    instead = "another multiple of 32, or 0 for one scale a row" if how.group else "8 bits"
    return f"{how.bits} bits in {groups} do not divide {', '.join(undivided)}; use {instead}"


def quantize_head(model: GLM, bits: int) -> Converted:
    """Gives the model a quantised copy of its head (groups of 32, int8 activations), which from
    then on computes the logits with half or a quarter of the memory reads. Embedding and loss do
    not change. Raises ConfigError, and ShapeError for a width that 32 does not divide."""
    head = model.head_weight
    quantized = QuantizedLinear(head, None, Quantization(bits=bits, group=32, activation_bits=8))
    model.head_codes = quantized
    return _converted("head", head, quantized)


def _convert(block: nn.Module, prefix: str, quantization: Quantization) -> Iterator[Converted]:
    names = [n for n, m in block.named_modules() if isinstance(m, Linear | GroupedLinear)]
    if HEADS in names:
        yield from _convert_heads(block.get_submodule("attention"), prefix, quantization)
    for path in (n for n in QUANTIZED if n in names):
        part, _, attribute = path.rpartition(".")
        owner = block.get_submodule(part)
        linear = getattr(owner, attribute)
        kind = QuantizedLinear if isinstance(linear, Linear) else QuantizedGroupedLinear
        quantized = kind(linear.weight, getattr(linear, "bias", None), quantization)
        setattr(owner, attribute, quantized)
        yield _converted(f"{prefix}.{path}", linear.weight, quantized)


def _convert_heads(attention: nn.Module, prefix: str, how: Quantization) -> Iterator[Converted]:
    """Replaces `attention.kv_b`."""
    linear = attention.kv_b
    assert isinstance(linear, HeadsLinear)
    attention.kv_b = both = QuantizedHeads.of(linear, how)
    (keys, _), (values, _) = split_heads(linear.weight, linear.widths, how)
    yield _converted(f"{prefix}.{HEADS}.keys", keys, both.keys)
    yield _converted(f"{prefix}.{HEADS}.values", values, both.values)


def _converted(name: str, weight: Tensor, quantized: QuantizedLinear) -> Converted:
    change = size = 0.0
    bits, matrices = quantized.quantization.bits, weight.detach().flatten(0, -2)
    codes, scale = quantized.weight.flatten(0, -2), quantized.scale
    scale = scale.reshape(len(codes), -1)
    for rows in row_parts(matrices):
        part = matrices[rows].float()
        back = dequantize(codes[rows], scale[rows], bits, torch.float32)
        change += float(back.sub_(part).norm()) ** 2
        size += float(part.norm()) ** 2
    error = math.sqrt(change / size) if size else 0.0
    return Converted(name, error, weight.nbytes, quantized.weight.nbytes + quantized.scale.nbytes)


def build_quantized(
    config: ModelConfig,
    read: Callable[[str, torch.Size], Tensor],
    quantization: Quantization,
    dtype: torch.dtype,
) -> GLM:
    """Returns a quantised model whose parameters are read one by one by `read(name, shape)`.
    Besides what is finished, at most one layer's float weights are in memory. Everything not
    quantised is in `dtype`."""
    with torch.device("meta"):
        model = GLM(config)
    _fill(model, "", read, dtype, recurse=False)
    for name, part in model.named_children():
        if name != "blocks":
            _fill(part, name, read, dtype)
    for i, block in enumerate(model.blocks):
        _fill(block, f"blocks.{i}", read, dtype)
        for _ in _convert(block, f"blocks.{i}", quantization):
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
        kept = ".router." in name  # float32, whatever the others are
        value = read(f"{prefix}.{name}".lstrip("."), parameter.shape)
        value = value.to(torch.float32 if kept else dtype)
        owner = module.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(value, requires_grad=False))


class DeviceMemory(NamedTuple):
    """Bytes on one device of a tensor-parallel group."""

    weights: int
    cache: int

    @property
    def total(self) -> int:
        """Weights and cache, without activations and the runtime's own memory."""
        return self.weights + self.cache


def device_memory(
    config: ModelConfig, quantization: Quantization, devices: int, length: int, batch: int = 1
) -> DeviceMemory:
    """Returns what inference takes on each of `devices`. Everything not quantised takes 2 bytes per
    value. Heads, ffn and vocabulary are split over the devices. Norms are on every device, and so
    are the biases and row scales of the two products that are split along their inputs (each shard
    has its own, because it is quantised after the split). Raises ConfigError for a model with
    experts."""
    require_dense(config, "memory of each device")
    c, d, n = config, config.hidden, devices
    heads_width = c.num_heads * c.head_dim
    qkv_width = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    up_width = c.ffn * (1 if c.activation == "gelu" else 2)
    qkv = _matrix_bytes(qkv_width / n, d, quantization)
    out = _matrix_bytes(d, heads_width / n, quantization)
    up = _matrix_bytes(up_width / n, d, quantization)
    down = _matrix_bytes(d, c.ffn / n, quantization)
    split_biases = c.qkv_bias * qkv_width / n + c.linear_bias * up_width / n
    whole_biases = c.linear_bias * 2 * d
    norm = d * (2 if c.norm == "layer" else 1)
    block_norms = norm * (4 if c.placement == "sandwich" else 2)
    block = qkv + out + up + down + VALUE_BYTES * (split_biases + whole_biases + block_norms)
    tables = c.vocab * d * (1 if c.tied_head else 2) / n
    positions = 2 * (c.max_length + 1) * d if c.positions == "learned_2d" else 0
    weights = c.num_layers * block + VALUE_BYTES * (tables + positions + norm)
    kv_width = max(c.num_kv_heads / n, 1) * c.head_dim
    keys_and_values = 2 * c.num_layers * batch * length * kv_width
    return DeviceMemory(round(weights), round(VALUE_BYTES * keys_and_values))


def _matrix_bytes(rows: float, columns: float, quantization: Quantization) -> float:
    """Returns the bytes of a quantised matrix: codes, and float16 scales."""
    groups = columns / quantization.group if quantization.group else 1
    return rows * columns * quantization.bits / 8 + VALUE_BYTES * rows * groups


def model_bytes(model: GLM) -> dict[str, Any]:
    """Returns the bytes of the linear layers and of everything else."""
    kinds = (QuantizedLinear, Linear, GroupedLinear)
    linears = [m for m in model.modules() if isinstance(m, kinds)]
    inside = sum(t.nbytes for m in linears for t in (*m.parameters(), *m.buffers()))
    everything = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    return {"linears_bytes": inside, "rest_bytes": everything - inside, "total_bytes": everything}
