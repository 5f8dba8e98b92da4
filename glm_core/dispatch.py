"""Decides who runs an op: the active backend's kernel or, recorded with its reason, the
reference.

The model calls `ops.rms_norm(x, weight)`. The call goes to the thread's interceptor if there is one
(`intercept`), else to `run`, which asks the active backend (`activate`) for a kernel."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from glm_core.choice import Choice
from glm_core.decode_step import DecodeStep, Stack
from glm_core.session import Kernel, KernelProvider, Session
from glm_core.spec import Cost, OpSpec, Sample, Support, declare, unsupported

Interceptor = Callable[["Op", tuple[Any, ...], dict[str, Any]], Any]


class _Reference:
    """The backend outside of any `use`: every op runs as its reference, which is no fallback."""

    name = "reference"
    references_only = True
    kernels: Mapping[str, Kernel] = {}

    def decode_step(self, stack: Stack) -> DecodeStep | Support:
        return unsupported("no backend is active")


_OUTSIDE = Session(_Reference(), strict=False)
"""the session outside of any `use`, in every thread"""


class _Active(threading.local):
    # not a ContextVar: torch.compile cannot trace ContextVar.get (torch 2.13); it traces and
    # guards a threading.local. Set in __init__, which runs in each thread: of attributes that the
    # class has too, torch 2.7 would read the class's.
    def __init__(self) -> None:
        self.session = _OUTSIDE
        self.kernels: Mapping[str, Kernel] = {}
        self.references_only = True
        self.interceptor: Interceptor | None = None


_active = _Active()


class Op(OpSpec):
    """A declared op. Calling it runs the active backend's kernel or the reference."""

    # no empty __slots__: torch.compile looks for OpSpec's slots there (torch 2.7)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        interceptor = _active.interceptor
        return run(self, args, kwargs) if interceptor is None else interceptor(self, args, kwargs)

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Returns the given arguments of a call by name."""
        return dict(zip(self.parameters, args, strict=False)) | kwargs


REGISTRY: dict[str, Op] = {}
"""every declared op by name"""


def op(
    *,
    samples: Callable[[], Iterable[Sample]],
    cost: Callable[..., Cost],
    differentiable: tuple[str, ...] = (),
    mutates: tuple[str, ...] = (),
    choice: Choice | None = None,
    may_keep_wide: str = "",
) -> Callable[[Callable[..., Any]], Op]:
    """Declares the decorated function as an op; its body is the reference: plain differentiable
    torch, right on every device and in float64. Arguments: see OpSpec."""

    def decorate(reference: Callable[..., Any]) -> Op:
        facts: dict[str, Any] = {"samples": samples, "cost": cost, "differentiable": differentiable}
        facts |= {"mutates": mutates, "choice": choice, "may_keep_wide": may_keep_wide}
        return REGISTRY.setdefault(reference.__name__, Op(**declare(reference, **facts)))

    return decorate


def run(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an op past any interceptor: by the kernel if it takes these arguments, else by the
    reference."""
    kernel = _active.kernels.get(op.name)
    if kernel is None:
        if _active.references_only:
            return op.reference(*args, **kwargs)
        reason = "no kernel for this op"
    else:
        if kernel.supports is None:
            return kernel.function(*args, **kwargs)
        support = kernel.supports(*args, **kwargs)
        if support.ok:
            return kernel.function(*args, **kwargs)
        reason = support.reason
    _active.session.fell_back(op.name, reason)
    return op.reference(*args, **kwargs)


@contextmanager
def activate(backend: KernelProvider, strict: bool = False) -> Iterator[Session]:
    """Makes `backend` active in this thread for the block, and the outer one again afterwards."""
    with resume(Session(backend, strict)) as session:
        yield session


@contextmanager
def resume(session: Session) -> Iterator[Session]:
    """Makes an open session active in this thread too. Autograd on accelerators runs backward
    passes, and recomputes forward ones, in threads of its own."""
    before = (_active.session, _active.kernels, _active.references_only)
    _active.session, _active.kernels = session, session.backend.kernels
    _active.references_only = session.backend.references_only
    try:
        yield session
    finally:
        _active.session, _active.kernels, _active.references_only = before


@contextmanager
def intercept(interceptor: Interceptor | None) -> Iterator[None]:
    """Sends every op call of this thread to `interceptor(op, args, kwargs)`, whose result replaces
    the op's; it may call `run`. None: no interceptor in this block."""
    before, _active.interceptor = _active.interceptor, interceptor
    try:
        yield
    finally:
        _active.interceptor = before


def session() -> Session:
    """Returns the session of this thread's innermost `use`."""
    return _active.session


def intercepted() -> bool:
    """Returns whether this thread's op calls go to an interceptor."""
    return _active.interceptor is not None
