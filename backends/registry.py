"""Which backends exist, which of them are usable here, and how one becomes active."""

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
"""entry point group: `name = "package.module"`; the module has `backend`, or `variant(option) ->
Backend`"""


def names() -> list[str]:
    """Every backend's name, our own folders first scanned, then installed packages."""
    return sorted({*_own(), *_plugins()})


@functools.cache
def _own() -> tuple[str, ...]:
    return tuple(m.name for m in pkgutil.iter_modules(_folder) if m.ispkg)


def _plugins() -> dict[str, metadata.EntryPoint]:
    return _installed(tuple(sys.path))


@functools.cache
def _installed(path: tuple[str, ...]) -> dict[str, metadata.EntryPoint]:
    """Read once a path: a search costs 3 ms, and `use` may stand around every token."""
    return {e.name: e for e in metadata.entry_points(group=GROUP)}


def get(name: str) -> Backend:
    """The backend, usable or not; `onnxrt:OpenVINOExecutionProvider` passes an option to it.
    Raises GlmCoreError for an unknown name, BackendUnavailableError where its module cannot be
    imported."""
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
    """Usable here? Never raises for a known name."""
    try:
        return get(name).probe()
    except BackendUnavailableError as error:
        return Probe(False, str(error))


def usable(name: str) -> Backend:
    """The backend, ready to run. Raises BackendUnavailableError with the backend's own reason."""
    backend = get(name)
    state = backend.probe()
    if not state.ok:
        raise BackendUnavailableError(f"backend {name} is not available here: {state.reason}")
    return backend


@contextmanager
def use(name: str | Backend, strict: bool = False) -> Iterator[Session]:
    """Runs every op of this thread on the backend. `strict` makes any fallback to a reference an
    error; without it the session's `fallbacks` counts each with its reason.

    A function that torch.compile made is compiled again in each session where an op of it falls
    back, so that every session learns of it, up to torch's recompile_limit (8): keep one session
    open around all its calls."""
    backend = usable(name) if isinstance(name, str) else name
    with dispatch.activate(backend, strict) as session:
        yield session


def table() -> dict[str, dict[str, str]]:
    """ops x backends, read from the registry: "kernel", "reference" (it runs there, as a recorded
    fallback), or "unsupported: ..." with the reason. Which arguments a kernel takes is asked by
    conformance in its support mode."""
    backends = {name: _cells(name) for name in names()}
    return {op: {name: cells[op] for name, cells in backends.items()} for op in all_ops()}


def _cells(name: str) -> dict[str, str]:
    try:
        backend = get(name)
    except BackendUnavailableError as error:
        return dict.fromkeys(all_ops(), f"unsupported: {error}")
    return {op: "kernel" if op in backend.kernels else "reference" for op in all_ops()}
