"""What an op is: its reference, samples and cost, declared in one place and independent of any
backend."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Support(NamedTuple):
    """A backend's answer to "can your kernel take these arguments?"; `reason` reaches the user
    unchanged."""

    ok: bool
    reason: str = ""


SUPPORTED = Support(True)


def unsupported(reason: str) -> Support:
    """The kernel refuses these arguments; `reason` says which fact about them is the obstacle."""
    return Support(False, reason)


class Cost(NamedTuple):
    """Arithmetic and memory traffic of one call, every tensor moved once (the roofline's
    compulsory traffic)."""

    flops: int
    """forward floating-point operations; a multiply-add counts as 2"""
    bytes: int
    """forward bytes read and written"""
    backward_flops: int = 0
    backward_bytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Draw:
    """Where a sample's tensors are made: working dtype, device and a seeded generator (always on
    the CPU)."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator


Maker = Callable[[Draw], Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One argument set of an op: constants as they are, tensors as makers, so that no memory is
    held."""

    id: str
    """readable, unique within the op, the filter on the command line: `2x5x96`, `2x5x96-tiny`"""
    args: Mapping[str, Any]
    real: bool = False
    """a shape of a published model: measured by the benches, too large for finite differences"""

    def make(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        """The arguments, the same values on every device; dtypes below float32 are rounded from
        float32."""
        draw = Draw(dtype, torch.device(device), torch.Generator().manual_seed(seed))
        return {k: realize(v, draw) for k, v in self.args.items()}


def realize(value: Any, draw: Draw) -> Any:
    """Turns makers, alone or in lists, into tensors."""
    if isinstance(value, list):
        return [realize(v, draw) for v in value]
    return value(draw) if callable(value) else value


def normal(
    *shape: int, mean: float = 0.0, std: float = 1.0, strided: bool = False, wide: bool = False
) -> Maker:
    """Normal values in the working dtype (`wide`: float32 at least); `strided` gives a
    non-contiguous view."""

    def make(draw: Draw) -> Tensor:
        full = (*shape[:-1], shape[-1] * 2) if strided else shape
        x = torch.randn(full, generator=draw.generator, dtype=torch.float32) * std + mean
        keep = torch.promote_types(draw.dtype, torch.float32) if wide else draw.dtype
        x = x.to(keep).to(draw.device)
        return x[..., : shape[-1]] if strided else x

    return make


def integers(low: int, high: int, *shape: int) -> Maker:
    """Uniform int64 in [low, high)."""
    return lambda draw: torch.randint(low, high, shape, generator=draw.generator).to(draw.device)


def exact(values: Any, dtype: torch.dtype, *shape: int) -> Maker:
    """Exactly these values in exactly this dtype, reshaped if a shape is given."""

    def make(draw: Draw) -> Tensor:
        x = torch.tensor(values, dtype=dtype, device=draw.device)
        return x.reshape(shape) if shape else x

    return make


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OpSpec:
    """An op as declared: everything the project knows about it apart from kernels."""

    name: str
    reference: Callable[..., Any]
    samples: Callable[[], Iterable[Sample]]
    cost: Callable[..., Cost]
    differentiable: tuple[str, ...]
    """tensor parameters (or lists of tensors) that receive a gradient"""
    mutates: tuple[str, ...]
    """parameters written in place"""
    parameters: tuple[str, ...]
    doc: str


def declare(reference: Callable[..., Any], **facts: Any) -> dict[str, Any]:
    """The fields of an OpSpec, read from the reference's own name, signature and docstring."""
    if not reference.__doc__:
        raise TypeError(
            f"op {reference.__name__}: no docstring; give formula, shapes, dtype rule and source"
        )
    parameters = tuple(inspect.signature(reference).parameters)
    for role in ("differentiable", "mutates"):
        if strange := set(facts[role]) - set(parameters):
            raise TypeError(
                f"op {reference.__name__}: {role} names {strange}, not among {parameters}"
            )
    doc = inspect.cleandoc(reference.__doc__)
    return {
        "name": reference.__name__,
        "reference": reference,
        "parameters": parameters,
        "doc": doc,
        **facts,
    }
