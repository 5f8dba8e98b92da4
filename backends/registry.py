"""Finds backends by name, says which are usable here, and makes one active."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import metadata

import torch

from glm_core import dispatch
from glm_core.backends import __path__ as _folder
from glm_core.backends.base import Backend, Probe
from glm_core.backends.exact import Exact
from glm_core.errors import BackendUnavailableError, ConfigError, GlmCoreError, in_one_line, unknown
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
    `onnxrt:OpenVINOExecutionProvider`. Raises GlmCoreError for an unknown name or option, and
    BackendUnavailableError if its module cannot be imported or gives no Backend."""
    base, _, option = name.partition(":")
    if base not in names():
        raise GlmCoreError(unknown("backend", base, names()))
    plugin = _plugins().get(base)
    path = plugin.module if plugin else f"{GROUP}.{base}"
    with _explained(f"backend {base} cannot be imported"):
        module = importlib.import_module(path)
    variant: Callable[[str], Backend] | None = getattr(module, "variant", None)
    if variant is None and option:
        raise GlmCoreError(f"backend {base}: takes no option, received {option!r}; write {base}")
    backend: object = getattr(module, "backend", None)
    if variant is not None:
        with _explained(f"backend {base}: variant({option!r}) of {path} failed"):
            backend = variant(option)
    if not isinstance(backend, Backend):
        found = "nothing" if backend is None else f"a {type(backend).__name__}"
        raise BackendUnavailableError(
            f"backend {base}: `{'variant' if variant else 'backend'}` of {path} gives {found}; it "
            "must give a glm_core.backends.base.Backend"
        )
    return backend


@contextmanager
def _explained(fact: str) -> Iterator[None]:
    """Raises BackendUnavailableError with `fact` and the reason where a vendor's code raises
    anything: one broken package must not stop commands that only list it. What the project itself
    raises passes, such as an unknown option."""
    try:
        yield
    except GlmCoreError:
        raise
    except (Exception, SystemExit) as error:
        raise BackendUnavailableError(f"{fact}: {_in_one_line(error)}") from error


def _in_one_line(error: BaseException) -> str:
    """Returns the error's message in one line, with its class unless the message speaks for
    itself."""
    text = in_one_line(error)
    return text.partition(": ")[2] or text if isinstance(error, ImportError) else text


def probe(name: str) -> Probe:
    """Returns whether the backend is usable here; never raises for a name of `names`."""
    try:
        return _probed(get(name))
    except BackendUnavailableError as error:
        return Probe(False, str(error))
    except GlmCoreError as error:
        if name not in names():  # an unknown name or option: the caller's mistake
            raise
        return Probe(False, str(error))


def _probed(backend: Backend) -> Probe:
    """Returns what the backend's own probe says; a probe that raises says no, and so does a device
    that torch does not know."""
    try:
        state = backend.probe()
    except Exception as error:  # a vendor's runtime may raise anything
        return Probe(False, f"its probe failed: {_in_one_line(error)}")
    try:
        torch.device(backend.device_type)
    except RuntimeError:
        lack = (
            f"torch knows no device {backend.device_type!r}; import the package that registers it"
        )
        return Probe(False, lack) if state.ok else state
    return state


def usable(name: str) -> Backend:
    """Returns the backend if it can run here. Raises BackendUnavailableError with its own
    reason."""
    backend = get(name)
    state = _probed(backend)
    if not state.ok:
        raise BackendUnavailableError(f"backend {name} is not available here: {state.reason}")
    return backend


def require_values(backend: Backend) -> None:
    """Raises ConfigError for a backend that computes shapes alone."""
    if backend.device_type == "meta" and backend.references_only:
        raise ConfigError(f"backend {backend.name}: computes shapes and no values; use another one")


def require_dtype(backend: Backend, dtype: str) -> None:
    """Raises ConfigError unless the backend computes values in this working dtype."""
    require_values(backend)
    known = [str(d).removeprefix("torch.") for d in backend.dtypes]
    if dtype not in known:
        raise ConfigError(
            f"train.dtype={dtype}: backend {backend.name} computes in {', '.join(known)}; use one "
            "of these"
        )


def require_exact(backend: Backend, dtype: str, needed: Iterable[str], plan: bool) -> None:
    """Raises ConfigError unless the backend sums exactly (docs/exact.md) in this working dtype, in
    all ops needed, and under a plan of several processes where there is one."""
    exact = _ordered(backend)
    lacks = sorted(set(needed) & set(exact.lacks))
    dtypes = [str(d).removeprefix("torch.") for d in exact.dtypes]
    for fact, broken in (
        (f"has no exact kernel of {', '.join(lacks)}", bool(lacks)),
        (f"sums exactly in {', '.join(dtypes)}, not in {dtype}", dtype not in dtypes),
        ("was shown to sum exactly in one process alone", plan and not exact.plans),
    ):
        if broken:
            raise ConfigError(
                f"exact: backend {backend.name} {fact}; use backend cpu, or leave exact out"
            )


def _ordered(backend: Backend) -> Exact:
    """Returns the backend's exact kernels. Raises ConfigError where it has none."""
    if backend.exact is None:
        raise ConfigError(
            f"exact: backend {backend.name} sums in no fixed order; use backend cpu, or leave "
            "exact out"
        )
    return backend.exact


@contextmanager
def use(name: str | Backend, strict: bool = False, exact: bool = False) -> Iterator[Session]:
    """Runs every op of this thread on the backend. The session's `fallbacks` counts each op that
    ran as its reference, with the reason; under `strict` that is an error.

    exact: every sum has an order that depends on its length alone (docs/exact.md), so a token's
    result has the same bits alone, in a batch, in training and in decoding. A reference in a
    kernel's place is an error then too. Raises ConfigError for a backend that cannot.

    torch.compile compiles a function again in each session in which one of its ops falls back, so
    that every session records it, but at most 8 times (torch's recompile_limit). Keep one session
    open around all calls of a compiled function."""
    backend = usable(name) if isinstance(name, str) else name
    ordered = _ordered(backend).switch() if exact else nullcontext()
    with ordered, dispatch.activate(backend, strict or exact) as session:
        session.exact = exact
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
    except GlmCoreError as error:
        return dict.fromkeys(all_ops(), f"unsupported: {error}")
    return {op: "kernel" if op in backend.kernels else "reference" for op in all_ops()}
