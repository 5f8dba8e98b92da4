"""Finds backends by name, says which are usable here, and makes one active."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata

from glm_core import dispatch
from glm_core.backends import __path__ as _folder
from glm_core.backends.base import Backend, Probe
from glm_core.errors import BackendUnavailableError, GlmCoreError, unknown
from glm_core.ops import all_ops
from glm_core.session import Session

GROUP = "glm_core.backends"
"""group of entry points `name = "package.module"`; the module defines `backend`, a Backend, or
`variant(option)`, which returns one"""


def names() -> list[str]:
    """Returns the names of all backends: our own folders and those of installed packages."""
    return sorted({*_own(), *_plugins()})


@functools.cache
def _own() -> tuple[str, ...]:
    return tuple(m.name for m in pkgutil.iter_modules(_folder) if m.ispkg)


def _plugins() -> dict[str, metadata.EntryPoint]:
    return _installed(tuple(sys.path))


@functools.cache
def _installed(path: tuple[str, ...]) -> dict[str, metadata.EntryPoint]:
    """Returns the entry points, searched once per `sys.path`: a search costs 3 ms, and `use` may be
    opened for every token."""
    return {e.name: e for e in metadata.entry_points(group=GROUP)}


def get(name: str) -> Backend:
    """Returns the backend, usable or not. What follows a colon is its option, as in
    `onnxrt:OpenVINOExecutionProvider`. Raises GlmCoreError for an unknown name,
    BackendUnavailableError if its module cannot be imported."""
    base, _, option = name.partition(":")
    if base not in names():
        raise GlmCoreError(unknown("backend", base, names()))
    plugin = _plugins().get(base)
    try:
        module = importlib.import_module(plugin.module if plugin else f"{GROUP}.{base}")
    except ImportError as error:
        raise BackendUnavailableError(f"backend {base} cannot be imported: {error}") from error
    variant: Callable[[str], Backend] | None = getattr(module, "variant", None)
    if variant is not None:
        return variant(option)
    if option:
        raise GlmCoreError(f"backend {base}: takes no option, received {option!r}; write {base}")
    backend: Backend = module.backend
    return backend


def probe(name: str) -> Probe:
    """Returns whether the backend is usable here; never raises for a known name."""
    try:
        return get(name).probe()
    except BackendUnavailableError as error:
        return Probe(False, str(error))


def usable(name: str) -> Backend:
    """Returns the backend if it can run here. Raises BackendUnavailableError with its own
    reason."""
    backend = get(name)
    state = backend.probe()
    if not state.ok:
        raise BackendUnavailableError(f"backend {name} is not available here: {state.reason}")
    return backend


@contextmanager
def use(name: str | Backend, strict: bool = False) -> Iterator[Session]:
    """Runs every op of this thread on the backend. The session's `fallbacks` counts each op that
    ran as its reference, with the reason; under `strict` that is an error.

    torch.compile compiles a function again in each session in which one of its ops falls back, so
    that every session records it, but at most 8 times (torch's recompile_limit). Keep one session
    open around all calls of a compiled function."""
    backend = usable(name) if isinstance(name, str) else name
    with dispatch.activate(backend, strict) as session:
        yield session


def table() -> dict[str, dict[str, str]]:
    """Returns a cell for each op and backend: "kernel", "reference" (it runs as a recorded
    fallback) or "unsupported: " with the reason. `glm-core conformance` shows which arguments each
    kernel takes."""
    backends = {name: _cells(name) for name in names()}
    return {op: {name: cells[op] for name, cells in backends.items()} for op in all_ops()}


def _cells(name: str) -> dict[str, str]:
    try:
        backend = get(name)
    except BackendUnavailableError as error:
        return dict.fromkeys(all_ops(), f"unsupported: {error}")
    return {op: "kernel" if op in backend.kernels else "reference" for op in all_ops()}
