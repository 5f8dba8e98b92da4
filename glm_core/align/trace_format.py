"""Defines what a trace file may hold, encodes it and checks it. A trace is checked when it is made
and when it is read. The format is described in docs/trace-format.md."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from glm_core.config import RunConfig, from_dict, to_dict
from glm_core.errors import GlmCoreError, TraceError

if TYPE_CHECKING:
    from glm_core.session import Fallback

KIND, VERSION = "glm_core trace", 1
MAX_BYTES, MAX_FIELDS = 1 << 28, 1 << 24
"""at most so many bytes in the file, and so many characters in its plain fields"""

ARRAYS: dict[str, tuple[str, ...]] = {
    "loss": ("N",),
    "grad_norm": ("N",),
    "control_loss": ("K", "N"),
    "loss_scale": ("M",),
    "skipped": ("M",),
    "control_loss_scale": ("Q", "M"),
    "control_skipped": ("Q", "M"),
    "moved_tokens": ("E", "U"),
    "gradient_norm": ("S", "P"),
    "gradient_sketch": ("S", "P", "W"),
    "loss_error": ("J1", "S"),
    "gradient_error": ("J1", "S", "P"),
    "digest": ("C", "W"),
    "test_values": ("T", "3"),
}
"""each array and the names of its axes; equal names mean equal sizes"""
LATER = ("loss_scale", "skipped", "control_loss_scale", "control_skipped", "moved_tokens")
"""arrays that older traces lack; they are empty there"""


class OpResult(TypedDict):
    """Names one result of one op call."""

    step: int
    """captured step, from 1; 0 where the calls of all steps were pooled"""
    call: int
    """number of the call in its step, from 0, over all ops; -1 where all calls were pooled"""
    op: str
    layer: str
    """number of the block; "" outside of blocks, and where all calls were pooled"""
    direction: str
    """forward or backward"""
    tensor: str
    """`y` (of several outputs `y0`, `y1`, ...), the gradient `d_ARGUMENT`, an argument that the op
    writes, or `change`: what an update did to its first argument"""


class OpTest(OpResult):
    """Names one statistical test of an op result."""

    dtype: str
    """the result's"""
    shape: list[int]
    """the result's"""
    projection: str
    """what was measured and in which group of elements: `scale`, `offset in row 7`, `sign in bin of
    result 12, all calls`"""


class FallbackCount(TypedDict):
    """Counts the calls that ran an op's reference in a kernel's place, for one reason."""

    op: str
    reason: str
    """the backend's own words"""
    count: int


class Routing(TypedDict):
    """Says how the choices of one captured router call differ from float64's."""

    step: int
    layer: str
    rows: int
    """tokens"""
    expected: float
    """tokens that rounding alone is expected to send elsewhere"""
    seen: int
    """tokens sent elsewhere"""
    wrong: int
    """those of them whose scores do not lie within rounding"""


class PlanTest(TypedDict):
    """Says how what a plan made of right gradients differs from what one process makes of them."""

    step: int
    test: str
    """`norm`: of all gradients, over all ranks; `copies`: of a gradient that several ranks hold;
    `update`: the first one of every rank's part"""
    parameter: str
    """the one that is furthest outside; "" for the norm"""
    ranks: list[int]
    """those that hold wrong values of it"""
    outside: int
    """parameters outside their limit"""
    measured: float
    """error relative to the norm, the gradient or the update's change"""
    limit: float


def per_million(call: Routing) -> float:
    """Returns the flips that are expected in a million tokens."""
    return 1e6 * call["expected"] / max(call["rows"], 1)


def fallback_counts(counts: Mapping[Fallback, int]) -> list[FallbackCount]:
    """Returns a session's fallbacks as rows."""
    return [{"op": f.op, "reason": f.reason, "count": n} for f, n in counts.items()]


def _kinds(row: type) -> dict[str, Any]:
    """Returns the kind (see `_is`) of every key of a row."""
    hints = get_type_hints(row)
    return {key: [*get_args(h)] if get_origin(h) is list else h for key, h in hints.items()}


DTYPES = ("float32", "bfloat16", "float16")
PLAIN: dict[str, Any] = {
    "config": dict,
    "backend": str,
    "dtype": DTYPES,
    "control_names": [str],
    "capture_steps": [int],
    "parameters": [str],
    "disguises": [str],
    "calls": [_kinds(OpResult)],
    "tests": [_kinds(OpTest)],
    "num_tests": int,
    "fallbacks": [_kinds(FallbackCount)],
    "routing": [_kinds(Routing)],
    "plan_tests": [_kinds(PlanTest)],
    "environment": dict,
    "data_order": str,
    "initial_weights": str,
    "seconds": float,
}
"""every other field and its kind (see `_is`)"""


def check(trace: Any) -> None:
    """Raises TraceError where a field has the wrong type or the sizes of two arrays disagree."""
    if bad := [name for name, kind in PLAIN.items() if not _is(getattr(trace, name), kind)]:
        raise TraceError(f"malformed fields {', '.join(bad)}; record the run again")
    sizes: dict[str, int] = {
        "K": len(trace.control_names),
        "S": len(trace.capture_steps),
        "P": len(trace.parameters),
        "J1": 1 + len(trace.disguises),
        "C": len(trace.calls),
        "T": len(trace.tests),
        "3": 3,
    }
    for name, letters in ARRAYS.items():
        array = getattr(trace, name)
        if array.dtype != np.float64 or array.ndim != len(letters):
            raise TraceError(
                f"array {name!r}: expected float64 [{', '.join(letters)}], received "
                f"{array.dtype} {list(array.shape)}; record the run again"
            )
        for letter, size in zip(letters, array.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise TraceError(
                    f"array {name!r}: {letter} must be {sizes[letter]}, received {size}; "
                    "record the run again"
                )


def encode(trace: Any) -> bytes:
    """Returns the file's content. Raises TraceError for a trace that `read` would refuse as too
    large."""
    arrays = {name: np.ascontiguousarray(getattr(trace, name)) for name in ARRAYS}
    fields = json.dumps({name: getattr(trace, name) for name in PLAIN})
    content = save(arrays, {"kind": KIND, "version": str(VERSION), "fields": fields})
    if len(fields) > MAX_FIELDS or len(content) > MAX_BYTES:
        raise TraceError(
            f"trace: {len(fields)} characters of fields and {len(content)} bytes in all, at most "
            f"{MAX_FIELDS} and {MAX_BYTES} are allowed; capture fewer steps"
        )
    return content


def _is(value: Any, kind: Any) -> bool:
    """Does the value have this kind? A kind is a type; [kind] for a list of such elements; {key:
    kind} for a row with exactly these keys; a tuple for a choice of strings; or `dict` for a table
    of plain values, nested at most one level deep."""
    if isinstance(kind, list):
        return type(value) is list and all(_is(x, kind[0]) for x in value)
    if isinstance(kind, dict):
        keys = type(value) is dict and value.keys() == kind.keys()
        return keys and all(_is(value[key], kind[key]) for key in kind)
    if isinstance(kind, tuple):
        return type(value) is str and value in kind
    if kind is dict and type(value) is dict:
        flat = [v for x in value.values() for v in (x.values() if type(x) is dict else [x])]
        return all(any(_is(x, k) for k in (str, int, float, bool)) for x in flat)
    if isinstance(value, bool) and kind is int:
        return False
    return isinstance(value, kind) and (kind is not int or abs(value) < 1 << 53)


def read(path: Path) -> dict[str, Any]:
    """Returns all fields of the trace in the file. `check` has yet to compare the arrays with each
    other. Raises TraceError."""
    metadata, arrays = _open(path)
    fields = _fields(metadata.get("fields", ""))
    try:
        fields["config"] = to_dict(from_dict(RunConfig, fields["config"]))
    except (GlmCoreError, AttributeError) as error:
        raise TraceError(f"config: {error}") from None
    return {**arrays, **fields}


def write_whole(path: Path, what: str, write: Callable[[Path], object]) -> None:
    """Makes a file, whole or not at all: `write` writes it beside its place. Raises TraceError,
    which names `what` is written, where the disk refuses it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise TraceError(
            f"{what} {path}: cannot be written ({error}); choose another path or free the disk"
        ) from None


def _open(path: Path) -> tuple[dict[str, str], dict[str, NDArray[np.float64]]]:
    """Returns the metadata and our arrays; foreign arrays are not even read."""
    try:
        size = path.stat().st_size if path.is_file() else -1
        if not 0 <= size <= MAX_BYTES:
            raise OSError("no such file" if size < 0 else f"{size} bytes, at most {MAX_BYTES}")
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if (kind := metadata.get("kind")) != KIND:
                raise TraceError(
                    f"kind {kind!r}, expected {KIND!r}; pass a file of glm-core align record"
                )
            if (version := metadata.get("version")) != str(VERSION):
                raise TraceError(
                    f"version {version!r}, this glm_core reads {VERSION}; record the run again"
                )
            found = [name for name in ARRAYS if name in file.keys()]  # noqa: SIM118  # no dict
            if missing := sorted(ARRAYS.keys() - set(found) - set(LATER)):
                raise TraceError(f"lacks {', '.join(missing)}; record the run again")
            for name in found:
                if (dtype := file.get_slice(name).get_dtype()) != "F64":
                    raise TraceError(f"array {name!r}: {dtype}, expected F64; record the run again")
            return metadata, {name: file.get_tensor(name) for name in found}
    except (OSError, SafetensorError, TypeError, ValueError, MemoryError) as error:
        raise TraceError(f"cannot be read ({error}); record the run again") from None


def _fields(text: str) -> dict[str, Any]:
    """Returns the plain fields by name; unknown ones are ignored."""
    if len(text) > MAX_FIELDS:
        raise TraceError(
            f"{len(text)} characters of fields, at most {MAX_FIELDS} are read; capture fewer steps"
        )
    try:
        values = json.loads(text)
        json.dumps(values, ensure_ascii=False).encode()  # fails on half of a surrogate pair
        for later in ("routing", "plan_tests"):  # older traces have none
            values.setdefault(later, [])
        return {name: values[name] for name in PLAIN} | {"seconds": float(values["seconds"])}
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise TraceError(f"malformed fields ({error!r}); record the run again") from None
