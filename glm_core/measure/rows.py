"""Stores a measurement as one line of JSON: what was timed, its rounds, the machine, and the
peer."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_core.errors import GlmCoreError
from glm_core.measure.timing import Timing

MACHINE_FACTS = ("cpu", "cores", "threads", "isa", "device")
"""facts of the machine that must agree before absolute times may be compared"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A measurement of one contestant of one bench."""

    bench: str
    key: str
    """unique within a run, the same in every run of the same measurement"""
    backend: str
    dtype: str
    shape: str
    seconds: tuple[float, ...]
    """time of each round"""
    peer: str = ""
    peer_seconds: tuple[float, ...] = ()
    """the peer's times of the same rounds: a slow spell of the machine hits both and divides out"""
    flops: float = 0.0
    """operations of one call; 0 where not counted"""
    bytes: float = 0.0
    """memory traffic of one call; 0 where not counted"""
    peak: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """tflops, gb_s and source"""
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """further results; each name carries its unit"""
    notes: tuple[str, ...] = ()
    machine: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def tflops(self) -> float:
        return self.flops / self.median_s / 1e12

    @property
    def gb_s(self) -> float:
        return self.bytes / self.median_s / 1e9

    @property
    def roof_tflops(self) -> float:
        """The most that this row can reach: min(peak, intensity x bandwidth); 0 where no peak or no
        cost is known. Williams, Waterman, Patterson 2009."""
        if not (self.peak and self.flops and self.bytes):
            return 0.0
        by_memory: float = self.flops / self.bytes * self.peak["gb_s"] / 1e3
        return min(float(self.peak["tflops"]), by_memory)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields with the figures derived from them."""
        derived: dict[str, Any] = {
            "median_ms": self.median_s * 1e3,
            "spread": Timing(seconds=self.seconds).spread,
        }
        if self.flops or self.bytes:
            derived |= {"tflops": self.tflops, "gb_s": self.gb_s}
        if roof := self.roof_tflops:
            derived |= {"roof_tflops": roof, "roof_share": self.tflops / roof}
        if self.peer_seconds:
            each = [p / s for p, s in zip(self.peer_seconds, self.seconds, strict=True)]
            derived["times_faster_than_peer"] = statistics.median(each)
        return dataclasses.asdict(self) | {"derived": derived}


FIELDS = {f.name: f for f in dataclasses.fields(Row)}
REQUIRED = ("bench", "key", "backend", "dtype", "shape", "seconds", "machine")


def append(rows: Iterable[Row], path: str | Path) -> None:
    """Appends a line for each row; a file may hold several runs."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(r.to_json(), ensure_ascii=False) + "\n" for r in rows)
    except OSError as error:
        raise GlmCoreError(f"bench file {target}: {error.strerror}; name another --out") from error


def read(path: str | Path) -> list[Row]:
    """Reads the rows of a file. Raises GlmCoreError that names the line which is not a row."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fact = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise GlmCoreError(f"bench file {path}: {fact}; write one with --out FILE") from error
    rows = [_row(line, f"bench file {path}, line {i}") for i, line in enumerate(lines, 1) if line]
    if not rows:
        raise GlmCoreError(f"bench file {path}: holds no rows; write some with --out FILE")
    return rows


def _row(line: str, place: str) -> Row:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise GlmCoreError(f"{place}: not JSON ({error}); was the file cut off?") from error
    if not isinstance(fields, dict) or (missing := [k for k in REQUIRED if k not in fields]):
        lacks = ", ".join(missing) if isinstance(fields, dict) else "everything"
        raise GlmCoreError(f"{place}: lacks {lacks}; such lines come from glm-core bench --out")
    known = {k: v for k, v in fields.items() if k in FIELDS}
    for name in ("seconds", "peer_seconds"):
        known[name] = _seconds(known.get(name, ()), f"{place}: {name}")
    if not known["seconds"] or not isinstance(known["machine"], dict):
        raise GlmCoreError(f"{place}: needs at least one of seconds, and a machine of facts")
    if known["peer_seconds"] and len(known["peer_seconds"]) != len(known["seconds"]):
        raise GlmCoreError(f"{place}: seconds and peer_seconds have different rounds")
    return Row(**known | {"notes": tuple(known.get("notes", ()))})


def _seconds(values: Any, place: str) -> tuple[float, ...]:
    good = isinstance(values, Sequence) and not isinstance(values, str)
    if not good or not all(isinstance(v, (int, float)) and 0 < v < 1e9 for v in values):
        raise GlmCoreError(f"{place}: must be a list of positive numbers")
    return tuple(float(v) for v in values)
