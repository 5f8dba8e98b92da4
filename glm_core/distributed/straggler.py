"""Finds the rank that slows a job down, and the op in which it loses its time: now and then every
rank times a step by op, and the times are compared.

A synchronous step takes equally long on all ranks, because the fast ones wait. So a rank's *own*
time counts: the step's time without waiting for others in collectives. On a device with a queue the
timed step waits for every op, which makes it slower than other steps."""

from __future__ import annotations

import dataclasses
import json
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from glm_core import dispatch
from glm_core.dispatch import Op
from glm_core.training.checkpoint import replace

COLLECTIVE = ("c10d", "_c10d_functional", "c10d_functional")
"""namespaces of torch's operators that communicate with other ranks"""
FACTOR = 1.1
"""own time over the others' median from which on a rank is called a straggler"""


class OpTimes(TorchDispatchMode):
    """Times one step by op. Time outside our ops is counted under the name of torch's operator."""

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.ops: Counter[str] = Counter()
        self.waiting_s = 0.0
        self._op = ""
        self._device_type = device_type

    def call(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs and times an op, for `dispatch.intercept`. Operators inside it belong to the op."""
        outer, self._op = self._op, op.name
        waited, begin = self.waiting_s, time.perf_counter()
        try:
            return dispatch.run(op, args, kwargs)
        finally:
            self._finish()
            took = time.perf_counter() - begin - (self.waiting_s - waited)
            self._op = outer
            if not outer:
                self.ops[op.name] += took  # type: ignore[assignment]  # seconds, not a count

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        begin = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        if func.namespace in COLLECTIVE:
            self.waiting_s += time.perf_counter() - begin
        elif not self._op:
            self._finish()
            name = f"{func.namespace}.{func.overloadpacket.__name__}"
            self.ops[name] += time.perf_counter() - begin  # type: ignore[assignment]  # as above
        return out

    def _finish(self) -> None:
        if self._device_type != "cpu":
            torch.get_device_module(self._device_type).synchronize()


@contextmanager
def timed(folder: Path, step: int, device_type: str, every: int) -> Iterator[None]:
    """Times the block where `every` divides `step`, and writes this rank's times into `folder`,
    which all hosts must see. Does nothing on other steps."""
    if not every or step % every:
        yield
        return
    times, plain, own = OpTimes(device_type), dist.Work.wait, threading.current_thread()

    def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
        thread = threading.current_thread()
        if thread is not own and not isinstance(thread, threading._DummyThread):
            return plain(work, *args, **kwargs)  # a checkpoint's; autograd's threads are dummies
        begin = time.perf_counter()
        try:
            return plain(work, *args, **kwargs)
        finally:
            times.waiting_s += time.perf_counter() - begin

    begin = time.perf_counter()
    setattr(dist.Work, "wait", wait)  # noqa: B010  # ranks wait in it
    try:
        with dispatch.intercept(times.call), times:
            yield
    finally:
        setattr(dist.Work, "wait", plain)  # noqa: B010
    seconds = time.perf_counter() - begin
    values = {"step": step, "step_s": seconds, "waiting_s": times.waiting_s, "ops": times.ops}
    rank = dist.get_rank()
    (folder / f"times-{rank}").mkdir(parents=True, exist_ok=True)
    replace(
        folder / f"times-{rank}" / "times.json",
        lambda p: p.write_text(json.dumps(values), encoding="utf-8"),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """The times of all ranks in one step, compared."""

    step: int
    own_s: dict[int, float]
    """by rank, without waiting for others"""
    waiting_s: dict[int, float]
    """by rank, waiting for others in collectives"""
    slowest: int
    ratio: float
    """its own time over the median of the others'"""
    variation: float
    """standard deviation of the own times over their mean"""
    op: str
    """the op in which it loses most against the others' median; `outside ops`: data, Python"""
    op_s: float
    op_median_s: float
    missing: list[int]
    """ranks whose times had not been written"""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Report:
        """Restores a report from JSON, where ranks have become strings."""
        by_rank = {k: {int(r): s for r, s in values[k].items()} for k in ("own_s", "waiting_s")}
        return cls(**{**values, **by_rank})

    def figures(self) -> dict[str, float]:
        """Returns the figures for TensorBoard and Prometheus."""
        return {
            "slowest_rank": self.slowest,
            "slowest_rank_ratio": self.ratio,
            "rank_variation_ratio": self.variation,
        }

    def text(self) -> str:
        """Returns the report as one line."""
        lost = f"; no times of rank {', '.join(map(str, self.missing))}" if self.missing else ""
        spread = f"own times vary by {self.variation:.1%}{lost}"
        if self.ratio < FACTOR:
            return f"step {self.step}: no straggler, {spread}"
        return (
            f"step {self.step}: straggler: rank {self.slowest} takes {self.ratio:.2f} times the "
            f"others' median ({self.own_s[self.slowest] * 1e3:.1f} ms), most of it in {self.op} "
            f"({self.op_s * 1e3:.1f} ms, others {self.op_median_s * 1e3:.1f} ms); {spread}"
        )


def report(folder: Path, step: int, world: int) -> Report | None:
    """Compares the ranks' times of `step`; None while fewer than two ranks have written theirs.
    After the ranks have met in the next step, all have."""
    times = {}
    for rank in range(world):
        try:
            values = json.loads(
                (folder / f"times-{rank}" / "times.json").read_text(encoding="utf-8")
            )
        except (OSError, ValueError):
            continue
        if values["step"] == step:
            times[rank] = values
    return compare(step, times, world) if len(times) > 1 else None


def compare(step: int, times: dict[int, dict[str, Any]], world: int) -> Report:
    """Finds the slowest rank and the op in which it loses its time. `times` holds by rank what
    `timed` has written."""
    own = {r: v["step_s"] - v["waiting_s"] for r, v in times.items()}
    slowest = max(own, key=lambda r: own[r])
    parts = {
        r: {**v["ops"], "outside ops": own[r] - sum(v["ops"].values())} for r, v in times.items()
    }
    others = [r for r in times if r != slowest]
    medians = {
        op: statistics.median(parts[r].get(op, 0.0) for r in others) for op in parts[slowest]
    }
    op = max(medians, key=lambda name: parts[slowest][name] - medians[name])
    median = statistics.median(own[r] for r in others)
    return Report(
        step=step,
        own_s=own,
        waiting_s={r: v["waiting_s"] for r, v in times.items()},
        slowest=slowest,
        ratio=own[slowest] / median,
        variation=statistics.pstdev(own.values()) / statistics.mean(own.values()),
        op=op,
        op_s=parts[slowest][op],
        op_median_s=medians[op],
        missing=sorted(set(range(world)) - times.keys()),
    )


class StragglerLog:
    """All reports of a run, in a file that is replaced after each report and so is always
    complete."""

    def __init__(self, path: Path, done: int) -> None:
        """Reads the reports of an earlier start, up to step `done`; later steps are done again."""
        self.path = path
        self.reports: list[Report] = []
        if path.is_file():
            every = json.loads(path.read_text(encoding="utf-8"))["reports"]
            self.reports = [Report.from_json(r) for r in every if r["step"] <= done]

    def add(self, report: Report) -> None:
        """Adds a report and writes the file."""
        self.reports = [r for r in self.reports if r.step < report.step] + [report]
        content = {"summary": self.text(), "reports": [dataclasses.asdict(r) for r in self.reports]}
        replace(
            self.path,
            lambda part: part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"),
        )

    def text(self) -> str:
        """Returns a summary of all reports in one line; "" where there are none."""
        if not self.reports:
            return ""
        steps = f"{len(self.reports)} timed steps"
        spread = f"own times vary by {statistics.median(r.variation for r in self.reports):.1%}"
        named = [r for r in self.reports if r.ratio >= FACTOR]
        if not named:
            return f"no straggler in {steps}; {spread}"
        rank, times = Counter(r.slowest for r in named).most_common(1)[0]
        worst = max((r for r in named if r.slowest == rank), key=lambda r: r.ratio)
        return (
            f"stragglers: rank {rank} in {times} of {steps}, at worst in step {worst.step}: "
            f"{worst.ratio:.2f} times the others' median, most of it in {worst.op}; {spread}"
        )
