"""Keeps a sample of the captured calls, and writes them as a file that another machine judges: with
the arguments and what was computed here."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from glm_core.align.trace_format import write_whole
from glm_core.errors import TraceError
from glm_core.verdict import calls, slices
from glm_core.verdict.calls import Recorded, Tensors
from glm_core.verdict.envelope import judge_curve
from glm_core.verdict.oracle import Call, Results
from glm_core.verdict.places import Place
from glm_core.verdict.report import Report, from_json

KIND, VERSION = "glm_core verdict record", 1
MAX_KEPT = 1 << 28
"""at most so many bytes of tensors are kept; an operator may use an eighth of them"""
MAX_BYTES, MAX_FIELDS = 2 * MAX_KEPT, 1 << 25
"""at most so many bytes in a file, and so many characters in its plain fields"""
PER_SHAPE = 2
"""so many calls of an operator are kept for the same shapes and dtypes, and so many wrong ones"""
ROWS = 1 << 16
"""of larger results and factors, rows and columns of about so many elements are kept"""
READABLE = (
    KeyError,
    TypeError,
    ValueError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
)
"""what malformed fields raise"""


class Recorder:
    """The calls that are kept."""

    def __init__(self, max_kept: int = MAX_KEPT) -> None:
        self.max_kept = max_kept
        self.tensors = Tensors()
        self.rows: list[dict[str, Any]] = []
        self.seen: Counter[Any] = Counter()
        self.bytes_of: Counter[str] = Counter()
        self.left_out: Counter[tuple[str, str]] = Counter()
        """by operator and reason"""

    def add(
        self, call: Call, actual: Results, place: Place, step: int, *, wrong: bool = False
    ) -> None:
        """Keeps a call, or notes why it is not kept. Neither is done for a call like one that is
        kept, and for one without tensors, such as `ones`."""
        if not call.tensors():
            return
        name = call.func._schema.name
        leaves = tree_leaves((call.args, call.kwargs))
        like = [(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else None for x in leaves]
        kind = (name, call.func._schema.overload_name, wrong, *like)
        self.seen[kind] += 1
        if self.seen[kind] > PER_SHAPE:
            return
        call, actual = slices.part(call, actual, len(self.rows), ROWS)
        call, actual = slices.columns(call, actual, len(self.rows), ROWS)
        size = sum(t.nbytes for t in (*call.tensors(), *actual.values()))
        if self.bytes_of[name] + size > self.max_kept // 8:
            self.left_out[name, "its tensors are too large for a record"] += 1
            return
        try:
            self.rows.append(calls.row(Recorded(call, actual, place, step), self.tensors))
        except (TypeError, RuntimeError, MemoryError) as error:
            self.left_out[name, f"a record cannot hold it: {error!s:.100}"] += 1
        self.bytes_of[name] += size

    def save(self, path: Path, report: Report) -> None:
        """Writes the record, whole or not at all. Raises TraceError where the disk refuses it."""
        fields = {
            "report": report.to_json(),
            "calls": self.rows,
            "left_out": [[*key, count] for key, count in self.left_out.items()],
        }
        metadata = {"kind": KIND, "version": str(VERSION), "fields": json.dumps(fields)}
        write_whole(path, "record", lambda part: save_file(self.tensors.values, part, metadata))


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What a record holds."""

    path: str
    report: Report
    calls: list[tuple[str, Recorded | None]]
    """operator and call; None where this torch lacks the operator"""
    left_out: list[tuple[str, str, int]]
    """operator, reason, number of calls"""
    curve: dict[str, Any]
    """`reference`, the curve that was followed there, and its `controls`; empty: there is none"""


def read(path: str | Path) -> Record:
    """Reads a record. Raises TraceError for a file that is missing, too large, truncated,
    malformed, no record at all, or of another version."""
    try:
        values, fields, curve = _open(Path(path))
        report, tensors = from_json(fields["report"]), Tensors(values)
        report.sentence()  # fails on fields of other types
        own = [(str(row["operator"]), calls.recorded(row, tensors)) for row in fields["calls"]]
        left_out = [(str(name), str(why), int(n)) for name, why, n in fields["left_out"]]
        if curve:
            judge_curve(curve["reference"], curve["controls"], curve["reference"], 0.1)
        return Record(str(path), report, own, left_out, curve)
    except TraceError as error:
        raise TraceError(f"record {path}: {error}") from None
    except READABLE as error:
        text = f"malformed fields ({error!r:.200}); record again"
        raise TraceError(f"record {path}: {text}") from None


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    try:
        size = path.stat().st_size if path.is_file() else -1
        if not 0 <= size <= MAX_BYTES:
            raise OSError("no such file" if size < 0 else f"{size} bytes, at most {MAX_BYTES}")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if (kind := metadata.get("kind")) != KIND:
                raise TraceError(
                    f"kind {kind!r:.80}, expected {KIND!r}; pass a file of glm-core verdict "
                    "--record"
                )
            if (version := metadata.get("version")) != str(VERSION):
                raise TraceError(
                    f"version {version!r:.80}, this glm_core reads {VERSION}; record again"
                )
            fields, curve = metadata.get("fields", ""), metadata.get("curve", "{}")
            if len(fields) > MAX_FIELDS:
                raise TraceError(
                    f"{len(fields)} characters of fields, at most {MAX_FIELDS}; record again"
                )
            # copies have the alignment of the program's tensors; a kernel's bits may depend on it
            tensors = {n: file.get_tensor(n).clone() for n in file.keys()}  # noqa: SIM118  # no dict
            return tensors, dict(json.loads(fields)), dict(json.loads(curve))
    except (OSError, SafetensorError, MemoryError) as error:
        raise TraceError(f"cannot be read ({error!s:.200}); record again") from None
