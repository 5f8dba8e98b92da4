"""Exported models on disk: named by everything that determines them, whole or absent, and never more than a bound."""

from __future__ import annotations

import hashlib
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from glm_core.backends.onnxrt.call import Call

MAX_BYTES = 512 * 2**20
MAX_FILES = 8192
_CHECKSUM = 32


def folder() -> Path:
    """`onnxrt` under GLM_CORE_CACHE, or under .cache of the working directory."""
    return Path(os.environ.get("GLM_CORE_CACHE") or ".cache") / "onnxrt"


def key(call: Call) -> str:
    """Names the model of a call by content: the reference's code with all it calls, the translator's own source,
    the versions of torch and onnx, shapes, dtypes and constants. The provider does not matter."""
    own = [p.read_bytes() for n in ("call", "graph", "translate", "export") if (p := _source(n))]
    facts = (
        call.direction, call.layout, call.numbers, call.tensors, call.op.differentiable, call.op.mutates,
        fingerprint(call.op.reference), [hashlib.sha256(source).hexdigest() for source in own],
        metadata.version("torch"), metadata.version("onnx"), sys.version_info[:2],
    )  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _source(module: str) -> Path:
    return Path(__file__).with_name(f"{module}.py")


def fingerprint(function: Callable[..., Any]) -> str:
    """Changes when the bytecode or the constants of the function change, or of any function outside torch that it
    reaches by a global name or a closure; not when a comment does."""
    parts: list[str] = []
    todo: list[Any] = [function]
    seen: set[int] = set()
    while todo:
        value = todo.pop()
        value = getattr(value, "reference", value)  # an op stands for its reference
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, types.FunctionType):
            if value.__module__.partition(".")[0] != "torch":
                cells = [c.cell_contents for c in value.__closure__ or ()]
                todo += [*cells, *(value.__defaults__ or ())]
                codes = list(_codes(value.__code__))
                parts += [repr((c.co_code, c.co_names, _plain(c.co_consts))) for c in codes]
                names = dict.fromkeys(n for c in codes for n in c.co_names)
                todo += [value.__globals__[n] for n in names if n in value.__globals__]
        elif not isinstance(value, types.ModuleType | type):
            parts.append(repr(value) if _plain((value,)) else type(value).__qualname__)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _plain(values: tuple[Any, ...]) -> list[Any]:
    """Those whose repr is their value."""
    kinds = (bool, int, float, complex, str, bytes, tuple, frozenset, types.NoneType)
    return [v for v in values if isinstance(v, kinds)]


def load(name: str) -> bytes | None:
    """The model, or None where there is none or what is there is damaged."""
    path = folder() / f"{name}.onnx"
    try:
        content = path.read_bytes()
        os.utime(path)  # the oldest are dropped first
    except OSError:
        return None
    checksum, model = content[:_CHECKSUM], content[_CHECKSUM:]
    return model if hashlib.sha256(model).digest() == checksum else None


def save(name: str, model: bytes) -> None:
    """Writes atomically. A cache that cannot be written costs a second export, not the run: it warns."""
    path = folder() / f"{name}.onnx"
    draft = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(hashlib.sha256(model).digest() + model)
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        warnings.warn(f"{path.parent}: cannot keep exported models ({error})", stacklevel=2)


def prune() -> None:
    """Removes the models used longest ago, down to the bounds."""
    kept = total = 0
    facts = [(p, p.stat()) for p in folder().glob("*.onnx")]
    for path, stat in sorted(facts, key=lambda fact: -fact[1].st_mtime):
        kept, total = kept + 1, total + stat.st_size
        if kept > MAX_FILES or total > MAX_BYTES:
            path.unlink(missing_ok=True)
