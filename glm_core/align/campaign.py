"""The whole comparison: every backend and dtype of a config against the reference, traces and
verdicts kept."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm_core.align.calibration import MakeSampler, Progress, calibrate
from glm_core.align.recording import record
from glm_core.align.verdict import Pair, Verdict, compare
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.config import Dtype, RunConfig
from glm_core.trace import Trace

REFERENCE = "reference"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What `run` found."""

    pairs: list[Pair]
    traces: dict[str, Trace]
    """by file name without suffix: `reference-float32`, `cpu-bfloat16`"""
    out_dir: Path
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """Diverged where any pair is."""
        diverged = any(pair.verdict == "diverged" for pair in self.pairs)
        return "diverged" if diverged else "aligned"

    def to_json(self) -> dict[str, Any]:
        """verdict, pairs[], seconds; the curves are in the traces."""
        pairs = [pair.to_json() for pair in self.pairs]
        files = {name: str(path(self.out_dir, name)) for name in self.traces}
        return {"verdict": self.verdict, "pairs": pairs, "seconds": self.seconds, "traces": files}


def run(
    config: RunConfig,
    backends: Sequence[str | Backend],
    *,
    out_dir: str | Path,
    dtypes: Sequence[Dtype] | None = None,
    controls: int = 8,
    capture_steps: Sequence[int] | None = None,
    sampler: MakeSampler | None = None,
    cache_dir: str = ".cache",
    false_alarm_rate: float = 1e-3,
    progress: Progress | None = None,
) -> Result:
    """Trains `config` on every backend from the same weights, data order and seed, in each of
    `dtypes` (default: the config's), and judges each against the reference, which always runs.
    Traces go to `out_dir`. Raises BackendUnavailableError before anything is trained."""
    begin, out = time.perf_counter(), Path(out_dir)
    chosen = {name_of(b): b for b in backends if name_of(b) != REFERENCE}
    for backend in chosen.values():
        if isinstance(backend, str):
            registry.usable(backend)
    pairs: list[Pair] = []
    traces: dict[str, Trace] = {}

    def keep(name: str, trace: Trace) -> Trace:
        traces[name] = trace
        trace.save(path(out, name))
        return trace

    for dtype in dtypes or (config.train.dtype,):
        typed = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype=dtype))
        cal = calibrate(
            typed, sampler=sampler, controls=controls, capture_steps=capture_steps,
            cache_dir=cache_dir, progress=progress,
        )  # fmt: skip
        reference = keep(f"{REFERENCE}-{dtype}", cal.reference)
        for name, backend in chosen.items():
            candidate = record(typed, backend, calibration=cal, progress=progress)
            pairs.append(
                compare(
                    reference, keep(f"{name}-{dtype}", candidate), false_alarm_rate=false_alarm_rate
                )
            )
    return Result(pairs=pairs, traces=traces, out_dir=out, seconds=time.perf_counter() - begin)


def name_of(backend: str | Backend) -> str:
    """The name it is reported under."""
    return backend if isinstance(backend, str) else backend.name


def path(out_dir: Path, name: str) -> Path:
    """Where the trace of this name is kept; characters that no file name may have become `-`."""
    return out_dir / (re.sub(r"[^\w.-]", "-", name) + ".trace")
