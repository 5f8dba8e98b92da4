"""What one use of a backend leaves behind: which ops fell back to the reference, how often, and
why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch

from glm_core.decode_step import DecodeStep, Stack
from glm_core.errors import UnsupportedOpError
from glm_core.spec import Support


class Kernel(NamedTuple):
    """A backend's function for an op, and the predicate that says which arguments it takes."""

    function: Callable[..., Any]
    supports: Callable[..., Support] | None


class KernelProvider(Protocol):
    """What dispatch needs to know of a backend."""

    @property
    def name(self) -> str: ...
    @property
    def kernels(self) -> Mapping[str, Kernel]: ...
    @property
    def references_only(self) -> bool: ...
    def decode_step(self, stack: Stack) -> DecodeStep | None: ...


class Fallback(NamedTuple):
    """One reason for which the reference ran instead of a kernel."""

    backend: str
    op: str
    reason: str


class Session:
    """One `use` of a backend. `fallbacks` counts calls; `compiled` counts torch.compile's traces,
    since compiled code never comes back here."""

    def __init__(self, backend: KernelProvider, strict: bool) -> None:
        self.backend, self.strict = backend, strict
        self.fallbacks: Counter[Fallback] = Counter()
        self.compiled: Counter[Fallback] = Counter()

    def fell_back(self, op: str, reason: str) -> None:
        """Records that the reference runs in a kernel's place; UnsupportedOpError under
        `strict`."""
        if torch.compiler.is_compiling():
            _fell_back_while_compiling(self, op, reason)
        else:
            self.record(self.fallbacks, op, reason)

    def record(self, counter: Counter[Fallback], op: str, reason: str) -> None:
        """Adds one to `counter`, or refuses under `strict`."""
        if self.strict:
            raise UnsupportedOpError(
                f"op {op} on backend {self.backend.name}: {reason}; "
                "drop strict to allow the reference"
            )
        counter[Fallback(self.backend.name, op, reason)] += 1


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]  # runs for real at trace time
def _fell_back_while_compiling(session: Session, op: str, reason: str) -> None:
    session.record(session.compiled, op, reason)
