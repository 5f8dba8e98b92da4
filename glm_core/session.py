"""Records, for one use of a backend, which ops fell back to the reference, how often, and why."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch

from glm_core.decode_step import DecodeStep, Stack
from glm_core.errors import UnsupportedOpError
from glm_core.spec import Support


class Kernel(NamedTuple):
    """A backend's function for an op, and the predicate that says which arguments it takes."""

    function: Callable[..., Any]
    """same parameters and results as the op's reference"""
    supports: Callable[..., Support] | None
    """same parameters as the op; None: the function takes all that the op allows"""


class KernelProvider(Protocol):
    """The part of a backend that dispatch uses; `backends.base.Backend` has it and more."""

    @property
    def name(self) -> str: ...
    @property
    def kernels(self) -> Mapping[str, Kernel]:
        """Kernels by the op's name."""
        ...

    @property
    def references_only(self) -> bool:
        """Whether the backend has no kernels by design; its references are then no fallbacks."""
        ...

    def decode_step(self, stack: Stack) -> DecodeStep | Support:
        """See `Backend.decode_step`."""
        ...


class Fallback(NamedTuple):
    """One reason why the reference ran instead of a kernel. With op = "decode_step": why the ops
    of a decode step ran one by one instead of all in one call."""

    backend: str
    op: str
    reason: str


_NUMBERS = itertools.count()


class Session:
    """One use of a backend (`registry.use`), with its fallbacks."""

    def __init__(self, backend: KernelProvider, strict: bool) -> None:
        self.backend = backend
        self.key = f"session {next(_NUMBERS)}"
        """its name for compiled code, which is compiled once for each: torch.compile guards a
        string by its value, and up to torch 2.7 it takes no object in `assume_constant_result`"""
        _BY_KEY[self.key] = self
        self.strict = strict
        """whether a reference in a kernel's place is an error"""
        self.exact = False
        """whether sums have the order of docs/exact.md"""
        self.fallbacks: Counter[Fallback] = Counter()
        """calls that fell back, outside of compiled code"""
        self.compiled: Counter[Fallback] = Counter()
        """fallbacks in compiled code, counted once for each time torch.compile traces it: compiled
        code never comes back here"""

    def fell_back(self, op: str, reason: str) -> None:
        """Records that the reference runs in a kernel's place. Raises UnsupportedOpError under
        `strict`."""
        if torch.compiler.is_compiling():
            _fell_back_while_compiling(self.key, op, reason)
        else:
            self.record(self.fallbacks, op, reason)

    def record(self, counter: Counter[Fallback], op: str, reason: str) -> None:
        """Adds one fallback to `counter`. Raises UnsupportedOpError under `strict`."""
        if self.strict:
            option = "exact" if self.exact else "strict"
            raise UnsupportedOpError(
                f"op {op} on backend {self.backend.name}: {reason}; "
                f"drop {option} to allow the reference"
            )
        counter[Fallback(self.backend.name, op, reason)] += 1

    def decoded_op_by_op(self, reason: str) -> None:
        """Records that a decode step called its ops one by one. `strict` allows it: each of those
        ops still has to have a kernel."""
        if not self.backend.references_only:
            self.fallbacks[Fallback(self.backend.name, "decode_step", reason)] += 1


_BY_KEY: WeakValueDictionary[str, Session] = WeakValueDictionary()


def _fell_back_while_compiling(key: str, op: str, reason: str) -> None:
    session = _BY_KEY[key]
    session.record(session.compiled, op, reason)


# As torch.compiler.assume_constant_result does, so that it runs for real at trace time. That
# function imports the whole compiler: more than a second in every process, most of which compile
# nothing.
_fell_back_while_compiling._dynamo_marked_constant = True  # type: ignore[attr-defined]
