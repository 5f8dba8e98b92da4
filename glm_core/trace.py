"""What one run leaves behind for the verdict: one portable file, bounded, read without torch."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from glm_core.errors import TraceError

KIND, VERSION = "glm_core trace", 1
Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One recorded run. N steps, K controls, S captured steps, P parameters, J benign disguises,
    C op calls, T tests, W numbers in a sketch. Every array is float64; where teacher forcing was
    not done, S, C and T are 0."""

    config: dict[str, Any]
    """the resolved RunConfig as plain values"""
    backend: str
    dtype: str
    loss: Array
    """[N]"""
    grad_norm: Array
    """[N], before clipping"""
    control_names: list[str]
    """how each control run differs from the reference; only the reference's trace has any"""
    control_loss: Array
    """[K, N]"""
    capture_steps: list[int]
    """steps at which both sides were given the same inputs, counted from 1"""
    parameters: list[str]
    gradient_norm: Array
    """[S, P]"""
    gradient_sketch: Array
    """[S, P, W]: random projections, the same directions in every trace"""
    loss_error: Array
    """[1 + J, S]: |loss - float64 loss| / |float64 loss|; row 0 this run, then the disguises"""
    gradient_error: Array
    """[1 + J, S, P]: |gradient - float64 gradient| / |float64 gradient|; rows as in loss_error"""
    disguises: list[str]
    """the J ways in which the reference itself was computed differently, the plain one first"""
    calls: list[dict[str, Any]]
    """C entries: step, call, op, layer, direction, tensor"""
    digest: Array
    """[C, W]: sketches of the results of each call in `calls`"""
    tests: list[dict[str, Any]]
    """T entries: op, direction, tensor, layer, step, call, dtype, shape, projection; of each family
    of tests (op, tensor, kind of group, statistic) the worst, pooled over calls and for one call"""
    test_values: Array
    """[T, 3]: effect, standard error, limit of the benign range (margin included)"""
    num_tests: int
    """tests made for `tests`"""
    fallbacks: list[dict[str, Any]]
    """op, reason, count: what ran on the reference instead of a kernel"""
    environment: dict[str, Any]
    data_order: str
    """sha256 over the inputs of all steps, in order"""
    initial_weights: str
    """sha256 over the float32 starting weights"""
    seconds: float

    def save(self, path: str | Path) -> None:
        """Writes the file whole or not at all. Raises TraceError where the disk refuses."""
        path = Path(path)
        arrays = {n: np.ascontiguousarray(getattr(self, n), np.float64) for n in _ARRAYS}
        plain = {f: getattr(self, f) for f in _PLAIN}
        metadata = {"kind": KIND, "version": str(VERSION), "fields": json.dumps(plain)}
        scratch = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
            os.close(handle)
            save_file(arrays, scratch, metadata)
            os.replace(scratch, path)
        except (OSError, SafetensorError) as error:
            Path(scratch).unlink(missing_ok=True) if scratch else None
            raise TraceError(f"trace {path}: cannot be written ({error}); free the disk") from None

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {
            "K": len(self.control_names), "S": len(self.capture_steps), "P": len(self.parameters),
            "J1": 1 + len(self.disguises), "C": len(self.calls), "T": len(self.tests), "3": 3,
        }  # fmt: skip
        for name, letters in _ARRAYS.items():
            array = getattr(self, name)
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


_ARRAYS: dict[str, tuple[str, ...]] = {
    "loss": ("N",), "grad_norm": ("N",), "control_loss": ("K", "N"),
    "gradient_norm": ("S", "P"), "gradient_sketch": ("S", "P", "W"),
    "loss_error": ("J1", "S"), "gradient_error": ("J1", "S", "P"), "digest": ("C", "W"),
    "test_values": ("T", "3"),
}  # fmt: skip
"""arrays and the names of their axes; equal names mean equal sizes"""

_PLAIN = {f.name: str(f.type) for f in dataclasses.fields(Trace) if f.name not in _ARRAYS}


def load(path: str | Path) -> Trace:
    """Reads and checks a trace. Raises TraceError for a file that is missing, truncated, foreign,
    of another version, or malformed."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError) as error:
        raise TraceError(f"trace {path}: cannot be read ({error}); record the run again") from None
    if metadata.get("kind") != KIND:
        raise TraceError(f"trace {path}: not a trace of glm_core; pass a file written by record")
    if metadata.get("version") != str(VERSION):
        raise TraceError(
            f"trace {path}: version {metadata.get('version')}, this glm_core reads {VERSION}; "
            "record the run again"
        )
    if missing := [name for name in _ARRAYS if name not in arrays]:
        raise TraceError(f"trace {path}: lacks {', '.join(missing)}; record the run again")
    try:
        return Trace(**{n: arrays[n] for n in _ARRAYS}, **_fields(metadata.get("fields", "")))
    except TraceError as error:
        raise TraceError(f"trace {path}: {error}") from None


def _fields(text: str) -> dict[str, Any]:
    """The plain fields, each of the kind its annotation begins with."""
    kinds: dict[str, Any] = {"dict": dict, "list": list, "str": str, "int": int, "float": float}
    try:
        values = json.loads(text)
        values["seconds"] = float(values["seconds"])
        bad = [
            name for name, hint in _PLAIN.items()
            if not isinstance(values[name], kinds[hint.partition("[")[0]])
        ]  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise TraceError(f"malformed fields ({error!r}); record the run again") from None
    if bad:
        raise TraceError(f"malformed fields {', '.join(bad)}; record the run again")
    return {name: values[name] for name in _PLAIN}
