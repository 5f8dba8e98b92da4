"""Says what a fault and a benign change are, and collects the ones that the modules of the op
families declare."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.dispatch import Op
from glm_core.faults.kernels import Function, Kernels, backend

Kind = Literal[
    "formula",
    "gradient",
    "optimizer",
    "mask",
    "position",
    "dtype",
    "eps",
    "scale",
    "rounding",
    "rows",
    "stale",
    "rare shape",
]
Direction = Literal["forward", "backward", "both", "update"]
BOTH = ("float32", "bfloat16")
FLOAT32 = ("float32",)
BFLOAT16 = ("bfloat16",)

ONLY_FLOAT32: dict[str, Any] = {
    "dtypes": ("float32",),
    "reason": "bfloat16 allows it: it rounds an intermediate once, to bfloat16 or a finer dtype",
}
ONLY_BFLOAT16: dict[str, Any] = {
    "dtypes": ("bfloat16",),
    "reason": "in float32 nothing is rounded to a narrower dtype or copied",
}
BENIGN_IN_FLOAT32: dict[str, Any] = {
    "dtypes": ("bfloat16",),
    "reason": "in float32 it is a benign change",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """A mistake in the kernel of one op; every other op is the reference."""

    op: str
    description: str
    kernels: Callable[[], Kernels]
    """makes the wrong kernels by op name; made anew for each backend, because some of them
    remember earlier calls"""
    mutant: str = ""
    """its name among the mutants that the op's conformance samples must reject; empty: it is not
    one"""
    planted: str = ""
    """its name in the sensitivity campaign, which plants it in a training run; empty: it does
    not"""
    kind: Kind = "formula"
    """the campaign's group; mutants are not grouped"""
    direction: Direction = "both"
    """what bisection must name when it is planted; `both`: the gradients are the wrong formula's"""
    setup: str = ""
    """the campaign's small model it is planted in; empty: the one for its op"""
    dtypes: tuple[str, ...] = BOTH
    """working dtypes in which the campaign counts it as a fault"""
    reason: str = ""
    """why it is none in the other dtype"""
    plant: Callable[[], AbstractContextManager[Any]] = nullcontext
    """is active around the candidate's run; for a mistake of a training step outside its ops"""

    @property
    def name(self) -> str:
        """The campaign's name of a planted fault, else the mutant's id."""
        return self.planted or self.id

    @property
    def id(self) -> str:
        """The mutant's id: `rms_norm/eps_outside_root`."""
        return f"{self.op}/{self.mutant}"

    def backend(self) -> Backend:
        """Returns a backend with the fault and without memory of earlier calls."""
        return backend(f"fault:{self.name}", self.kernels())


@dataclasses.dataclass(frozen=True, slots=True)
class Benign:
    """An honest change: kernels that round differently, another backend, or another way to run."""

    name: str
    op: str
    """the op it changes; empty: all"""
    description: str
    kernels: Kernels = dataclasses.field(default_factory=dict)
    setup: str = ""
    """the campaign's small model it runs in; empty: the one for its op"""
    dtypes: tuple[str, ...] = BOTH
    """working dtypes in which it changes some bit"""
    registered: str = ""
    """the name of a registered backend that runs in place of kernels"""
    micro_batch: int = 0
    """sequences per forward; 0: as in the reference"""
    threads: int = 1
    by_library: bool = False
    """it only asks the CPU's matrix library in another way; on some CPUs the library then sums in
    the same order, and no bit changes"""
    ordinary: bool = False
    """it is right for arguments of ordinary size only; conformance, which asks for extreme ones
    too, rejects it rightly"""
    neutral: bool = False
    """it may change no bit in a model this small: it runs, but is no evidence and is not counted"""

    def backend(self) -> Backend:
        """Returns the changed backend. Raises BackendUnavailableError where a registered one is not
        available."""
        if self.registered:
            return registry.get(self.registered)
        return backend(f"benign:{self.name}", self.kernels)


FAULTS: list[Fault] = []
BENIGN: list[Benign] = []


def fault(op: Op, description: str, kernel: Function | Kernels, **rest: Any) -> None:
    """Declares a fault: the kernel of `op`, or kernels by op name; the other arguments are Fault's
    fields."""
    kernels = {op.name: kernel} if callable(kernel) else kernel
    FAULTS.append(Fault(op.name, description, lambda: kernels, **rest))


def stateful_fault(op: Op, description: str, make: Callable[[], Function], **rest: Any) -> None:
    """Declares a fault whose kernel remembers earlier calls; `make` makes a new one."""
    FAULTS.append(Fault(op.name, description, lambda: {op.name: make()}, **rest))


def planted_in_step(
    name: str, description: str, plant: Callable[[], AbstractContextManager[Any]], **rest: Any
) -> None:
    """Declares a mistake of a training step outside its ops: every kernel is the reference."""
    FAULTS.append(Fault("", description, dict, planted=name, plant=plant, **rest))


def mutant(op: Op, description: str, **rest: Any) -> Callable[[Function], Function]:
    """Declares the decorated kernel as a fault of `op`: a mutant with the function's name."""

    def declare(kernel: Function) -> Function:
        fault(op, description, kernel, mutant=kernel.__name__, **rest)
        return kernel

    return declare


def planted(
    name: str, kind: Kind = "formula", direction: Direction = "both", **rest: Any
) -> dict[str, Any]:
    """Returns the fields of a fault that the campaign plants; `rest` may hold setup, dtypes and
    reason."""
    return {"planted": name, "kind": kind, "direction": direction, **rest}


def benign(name: str, op: Op, description: str, kernel: Function | Kernels, **rest: Any) -> None:
    """Declares a benign change: the kernel of `op`, or kernels by op name; the other arguments are
    Benign's fields."""
    kernels = {op.name: kernel} if callable(kernel) else kernel
    BENIGN.append(Benign(name, op.name, description, kernels, **rest))
