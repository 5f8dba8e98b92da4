"""Who runs an op: the active backend's kernel, or, recorded with its reason, the reference."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from glm_core.decode_step import DecodeStep, Stack
from glm_core.session import Kernel, KernelProvider, Session
from glm_core.spec import Cost, OpSpec, Sample, declare

Interceptor = Callable[["Op", tuple[Any, ...], dict[str, Any]], Any]


class _Reference:
    """The backend outside any `use`: no kernels, every op is its reference, and that is no
    fallback."""

    name = "reference"
    references_only = True
    kernels: Mapping[str, Kernel] = {}

    def decode_step(self, stack: Stack) -> DecodeStep | None:
        return None


class _Active(threading.local):
    # not a ContextVar: torch.compile cannot trace ContextVar.get (torch 2.13); this it traces and
    # guards
    session = Session(_Reference(), strict=False)
    kernels: Mapping[str, Kernel] = {}
    references_only = True
    interceptor: Interceptor | None = None


_active = _Active()


class Op(OpSpec):
    """A declared op; calling it runs the active backend's kernel or the reference."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        interceptor = _active.interceptor
        return run(self, args, kwargs) if interceptor is None else interceptor(self, args, kwargs)


REGISTRY: dict[str, Op] = {}


def op(
    *,
    samples: Callable[[], Iterable[Sample]],
    cost: Callable[..., Cost],
    differentiable: tuple[str, ...] = (),
    mutates: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Op]:
    """Declares an op: the decorated body is its reference, plain differentiable torch, right in
    float64 too."""

    def decorate(reference: Callable[..., Any]) -> Op:
        facts = {
            "samples": samples,
            "cost": cost,
            "differentiable": differentiable,
            "mutates": mutates,
        }
        return REGISTRY.setdefault(reference.__name__, Op(**declare(reference, **facts)))

    return decorate


def run(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dispatches past any interceptor: kernel if there is one for these arguments, else the
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
    """Makes `backend` active in this thread for the block; nested uses restore the outer one."""
    with resume(Session(backend, strict)) as session:
        yield session


@contextmanager
def resume(session: Session) -> Iterator[Session]:
    """Makes a session active in this thread, perhaps another than it was opened in: on accelerators
    autograd runs, and recomputes, in threads of its own."""
    before = (_active.session, _active.kernels, _active.references_only)
    _active.session, _active.kernels = session, session.backend.kernels
    _active.references_only = session.backend.references_only
    try:
        yield session
    finally:
        _active.session, _active.kernels, _active.references_only = before


@contextmanager
def intercept(interceptor: Interceptor | None) -> Iterator[None]:
    """Sends every op call of this thread through `interceptor(op, args, kwargs)`, which may call
    `run`."""
    before, _active.interceptor = _active.interceptor, interceptor
    try:
        yield
    finally:
        _active.interceptor = before


def session() -> Session:
    """The innermost active `use` of this thread."""
    return _active.session


def intercepted() -> bool:
    """Does somebody want to see every op call of this thread?"""
    return _active.interceptor is not None
