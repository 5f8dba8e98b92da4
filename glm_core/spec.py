"""Defines what an op is: reference, samples and cost, declared once for all backends."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glm_core.choice import Choice


class Support(NamedTuple):
    """Whether a kernel takes certain arguments. `reason` reaches the user unchanged."""

    ok: bool
    reason: str = ""
    """which fact about the arguments is the obstacle; empty if `ok`"""


SUPPORTED = Support(True)


def unsupported(reason: str) -> Support:
    """Returns a refusal, for example unsupported("width 33 is odd")."""
    return Support(False, reason)


class Cost(NamedTuple):
    """Arithmetic and compulsory memory traffic of one call: every tensor is moved once."""

    flops: int
    """forward floating-point operations; a multiply-add counts as 2"""
    bytes: int
    """forward bytes read and written"""
    backward_flops: int = 0
    backward_bytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Draw:
    """What a maker needs to create a sample's tensor."""

    dtype: torch.dtype
    """the working dtype"""
    device: torch.device
    generator: torch.Generator
    """seeded, always on the CPU, so that values are the same on every device"""


Maker = Callable[[Draw], Any]
"""creates one tensor argument of a sample"""


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One set of arguments of an op: constants, and makers of tensors, which take no memory."""

    id: str
    """readable and unique within the op; selects cases on the command line: `2x5x96-tiny`"""
    args: Mapping[str, Any]
    real: bool = False
    """a shape of a published model: used by benches, too large for finite differences"""
    large: bool = False
    """past tiles, powers of two and long rows, where some errors begin"""

    def make(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        """Returns the arguments, the same values on every device: float32 draws, rounded."""
        draw = Draw(dtype, torch.device(device), torch.Generator().manual_seed(seed))
        return {k: realize(v, draw) for k, v in self.args.items()}


def realize(value: Any, draw: Draw) -> Any:
    """Turns makers, alone or in lists, into tensors; returns other values as they are."""
    if isinstance(value, list):
        return [realize(v, draw) for v in value]
    return value(draw) if callable(value) else value


def normal(
    *shape: int, mean: float = 0.0, std: float = 1.0, strided: bool = False, wide: bool = False
) -> Maker:
    """Makes normal values in the working dtype. `wide`: in float32 at least. `strided`: as a
    non-contiguous view."""

    def make(draw: Draw) -> Tensor:
        full = (*shape[:-1], shape[-1] * 2) if strided else shape
        x = torch.randn(full, generator=draw.generator, dtype=torch.float32) * std + mean
        dtype = torch.promote_types(draw.dtype, torch.float32) if wide else draw.dtype
        x = x.to(dtype).to(draw.device)
        return x[..., : shape[-1]] if strided else x

    return make


def integers(low: int, high: int, *shape: int) -> Maker:
    """Makes uniform int64 values in [low, high)."""
    return lambda draw: torch.randint(low, high, shape, generator=draw.generator).to(draw.device)


def exact(values: Any, dtype: torch.dtype, *shape: int) -> Maker:
    """Makes exactly these values in this dtype, reshaped to `shape` if there is one."""

    def make(draw: Draw) -> Tensor:
        x = torch.tensor(values, dtype=dtype, device=draw.device)
        return x.reshape(shape) if shape else x

    return make


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OpSpec:
    """Everything the project knows about an op apart from its kernels."""

    name: str
    reference: Callable[..., Any]
    """what the op means: plain differentiable torch, right on any device and in float64"""
    samples: Callable[[], Iterable[Sample]]
    cost: Callable[..., Cost]
    """takes the op's own arguments"""
    differentiable: tuple[str, ...]
    """tensor parameters (or lists of tensors) that receive a gradient"""
    mutates: tuple[str, ...]
    """parameters written in place"""
    parameters: tuple[str, ...]
    doc: str
    """formula, shapes, dtype rule, source: the reference's docstring"""
    choice: Choice | None = None
    """how the op's first result is judged if it is a choice"""
    may_keep_wide: str = ""
    """what the reference rounds inside, and a kernel may keep in float32; empty: nothing"""


def declare(reference: Callable[..., Any], **facts: Any) -> dict[str, Any]:
    """Returns the fields of an OpSpec: `facts`, and what the reference's name, signature and
    docstring say. Raises TypeError without a docstring, or where facts name unknown parameters."""
    name = reference.__name__
    if not reference.__doc__:
        raise TypeError(f"op {name}: no docstring; give formula, shapes, dtype rule and source")
    parameters = tuple(inspect.signature(reference).parameters)
    for role in ("differentiable", "mutates"):
        if strange := set(facts[role]) - set(parameters):
            raise TypeError(f"op {name}: {role} names {strange}, not among {parameters}")
    doc = inspect.cleandoc(reference.__doc__)
    return {"name": name, "reference": reference, "parameters": parameters, "doc": doc, **facts}
