"""Stores exported models on disk. A file's name is a hash of everything its content depends on;
files are written whole or not at all, and their number and size are bounded."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from glm_core import environment
from glm_core.backends.onnxrt.call import Call
from glm_core.dispatch import Op

MAX_BYTES = 512 * 2**20
"""bytes of all models together"""
MAX_FILES = 8192
"""models"""
PRUNE_EVERY = 64
"""models written between two checks of these bounds"""
_CHECKSUM = 32
_FOLDER = Path(__file__).parent
_writes = itertools.count()


def folder() -> Path:
    """Returns `onnxrt` under GLM_CORE_CACHE, or under .cache in the working directory."""
    return environment.cache() / "onnxrt"


def key(call: Call) -> str:
    """Returns the name of a call's model: a hash of the reference's code with all it calls, the
    translator's code, the versions of torch and onnx, shapes, dtypes and constants. The provider
    does not matter."""
    facts = (call.direction, call.layout, call.numbers, call.tensors, _origin(call.op))
    return hashlib.sha256(repr(facts).encode()).hexdigest()


@functools.cache
def _origin(op: Op) -> str:
    """Returns what a model of this op depends on besides its call."""
    own = [hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(_FOLDER.glob("*.py"))]
    versions = [metadata.version(p) for p in ("torch", "onnx")]
    return repr((fingerprint(op.reference), op.differentiable, op.mutates, own, versions))


def fingerprint(function: Callable[..., Any]) -> str:
    """Returns a hash of the bytecode and constants of the function and of every function outside
    torch that it reaches by name or in a closure. Comments do not change it."""
    parts = [sys.version]  # bytecode differs between Pythons
    todo: list[Any] = [function]
    seen: set[int] = set()
    while todo:
        value = todo.pop()
        value = getattr(value, "reference", value)  # an op stands for its reference
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, types.FunctionType):
            if not _is_torch(value.__module__):
                todo += _reached(value)
                parts += [repr((c.co_code, c.co_names, _plain(c.co_consts))) for c in _codes(value)]
        elif not isinstance(value, types.ModuleType | type):
            parts += [repr(x) for x in _plain((value,))] or [type(value).__qualname__]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _reached(function: types.FunctionType) -> list[Any]:
    """Returns what a function can use: its closure, defaults, the globals that its code names, and
    the attributes it names of modules among these."""
    cells = [c.cell_contents for c in function.__closure__ or ()]
    names = dict.fromkeys(n for c in _codes(function) for n in c.co_names)
    known = [v for n, v in function.__globals__.items() if n in names]
    modules = [m for m in known if isinstance(m, types.ModuleType) and not _is_torch(m.__name__)]
    inside = [getattr(m, n) for m in modules for n in names if hasattr(m, n)]
    return [*cells, *(function.__defaults__ or ()), *known, *inside]


def _is_torch(module: str | None) -> bool:
    return (module or "").partition(".")[0] == "torch"


def _codes(function: types.FunctionType) -> Iterator[types.CodeType]:
    """Yields the function's code and the code of functions defined in it."""
    todo = [function.__code__]
    while todo:
        code = todo.pop()
        yield code
        todo += [c for c in code.co_consts if isinstance(c, types.CodeType)]


def _plain(values: tuple[Any, ...]) -> list[Any]:
    """Returns the values whose repr says all about them."""
    kinds = (bool, int, float, complex, str, bytes, tuple, frozenset, types.NoneType)
    return [v for v in values if isinstance(v, kinds)]


def load(name: str) -> bytes | None:
    """Returns the model, or None where there is none or the file is damaged."""
    path = folder() / f"{name}.onnx"
    try:
        content = path.read_bytes()
        os.utime(path)  # `prune` removes the models used longest ago
    except OSError:
        return None
    checksum, model = content[:_CHECKSUM], content[_CHECKSUM:]
    return model if hashlib.sha256(model).digest() == checksum else None


def save(name: str, model: bytes) -> None:
    """Writes a model atomically. Where the cache cannot be written it warns: that costs another
    export, not the run."""
    path = folder() / f"{name}.onnx"
    draft = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(hashlib.sha256(model).digest() + model)
        draft.replace(path)
        if next(_writes) % PRUNE_EVERY == 0:
            prune()
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        warnings.warn(f"{path.parent}: cannot store exported models ({error})", stacklevel=2)


def prune() -> None:
    """Removes the models used longest ago until the bounds hold."""
    count = total = 0
    for entry in sorted(os.scandir(folder()), key=lambda e: -e.stat().st_mtime):
        count, total = count + 1, total + entry.stat().st_size
        if count > MAX_FILES or total > MAX_BYTES:
            Path(entry.path).unlink(missing_ok=True)
