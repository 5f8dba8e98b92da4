"""What a trace file may hold, checked when a trace is made and when it is read; see
docs/trace-format.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from glm_core.config import RunConfig, from_dict, to_dict
from glm_core.errors import GlmCoreError, TraceError

KIND, VERSION = "glm_core trace", 1
MAX_BYTES, MAX_FIELDS = 1 << 28, 1 << 24
"""of the file; characters of the plain fields in it"""

ARRAYS: dict[str, tuple[str, ...]] = {
    "loss": ("N",),
    "grad_norm": ("N",),
    "control_loss": ("K", "N"),
    "gradient_norm": ("S", "P"),
    "gradient_sketch": ("S", "P", "W"),
    "loss_error": ("J1", "S"),
    "gradient_error": ("J1", "S", "P"),
    "digest": ("C", "W"),
    "test_values": ("T", "3"),
}
"""arrays and the names of their axes; equal names mean equal sizes"""

DTYPES = ("float32", "bfloat16", "float16")
_CALL = {"step": int, "call": int, "op": str, "layer": str, "direction": str, "tensor": str}
PLAIN: dict[str, Any] = {
    "config": dict,
    "backend": str,
    "dtype": DTYPES,
    "control_names": [str],
    "capture_steps": [int],
    "parameters": [str],
    "disguises": [str],
    "calls": [_CALL],
    "tests": [_CALL | {"dtype": str, "shape": [int], "projection": str}],
    "num_tests": int,
    "fallbacks": [{"op": str, "reason": str, "count": int}],
    "environment": dict,
    "data_order": str,
    "initial_weights": str,
    "seconds": float,
}
"""the other fields, what they hold and, of the rows of tables, the keys"""


def check(trace: Any) -> None:
    """Raises TraceError for a field of another type and for arrays whose sizes disagree."""
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
    """The file's content. Raises TraceError for a trace that `read` would refuse as too large."""
    arrays = {name: np.ascontiguousarray(getattr(trace, name)) for name in ARRAYS}
    fields = json.dumps({name: getattr(trace, name) for name in PLAIN})
    content = save(arrays, {"kind": KIND, "version": str(VERSION), "fields": fields})
    if len(fields) > MAX_FIELDS or len(content) > MAX_BYTES:
        raise TraceError(
            f"trace: {len(fields)} characters of fields, {len(content)} bytes in all; at most "
            f"{MAX_FIELDS} and {MAX_BYTES}: capture fewer steps"
        )
    return content


def _is(value: Any, kind: Any) -> bool:
    """A list's kind is [that of its elements], a row's {key: kind}, a choice's the values; a dict's
    values are plain, alone or in tables of one level."""
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
    """All fields of the trace in the file, the arrays not yet checked against each other. Raises
    TraceError."""
    metadata, arrays = _open(path)
    fields = _fields(metadata.get("fields", ""))
    try:
        fields["config"] = to_dict(from_dict(RunConfig, fields["config"]))
    except (GlmCoreError, AttributeError) as error:
        raise TraceError(f"config: {error}") from None
    return {**arrays, **fields}


def _open(path: Path) -> tuple[dict[str, str], dict[str, NDArray[np.float64]]]:
    """Metadata of our kind and version, and our arrays; others are not even read."""
    try:
        size = path.stat().st_size if path.is_file() else -1
        if not 0 <= size <= MAX_BYTES:
            raise OSError("no such file" if size < 0 else f"{size} bytes, at most {MAX_BYTES}")
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if (kind := metadata.get("kind")) != KIND:
                raise TraceError(f"kind {kind!r}, expected {KIND!r}; pass a file written by record")
            if (version := metadata.get("version")) != str(VERSION):
                raise TraceError(
                    f"version {version!r}, this glm_core reads {VERSION}; record the run again"
                )
            if missing := sorted(ARRAYS.keys() - set(file.keys())):
                raise TraceError(f"lacks {', '.join(missing)}; record the run again")
            for name in ARRAYS:
                if (dtype := file.get_slice(name).get_dtype()) != "F64":
                    raise TraceError(f"array {name!r}: {dtype}, expected F64; record the run again")
            return metadata, {name: file.get_tensor(name) for name in ARRAYS}
    except (OSError, SafetensorError, TypeError, ValueError, MemoryError) as error:
        raise TraceError(f"cannot be read ({error}); record the run again") from None


def _fields(text: str) -> dict[str, Any]:
    """The plain fields by name; others are ignored."""
    if len(text) > MAX_FIELDS:
        raise TraceError(f"{len(text)} characters of fields, at most {MAX_FIELDS}; record less")
    try:
        values = json.loads(text)
        json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair is no text
        return {name: values[name] for name in PLAIN} | {"seconds": float(values["seconds"])}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise TraceError(f"malformed fields ({error!r}); record the run again") from None
