"""What a run writes beside training: learning rates as CSV or TensorBoard events, times per phase,
FLOPs of one forward."""

from __future__ import annotations

import contextlib
import csv
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from glm_core.deepspeed import accelerator
from glm_core.errors import ConfigError

if TYPE_CHECKING:
    from glm_core.deepspeed.engine import DeepSpeedEngine

Event = tuple[str, float, int]
"""name, value, samples seen"""


class Monitor:
    """Writes on rank 0 to what the config enables: csv_monitor (DeepSpeed's files and columns),
    tensorboard."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises ConfigError where TensorBoard is wanted and not installed."""
        self.folder: Path | None = None
        self.writer: Any = None
        if dist.get_rank() == 0:
            self.folder = _place(config.get("csv_monitor", {}))
            self.writer = _tensorboard(_place(config.get("tensorboard", {})))
        self.enabled = self.folder is not None or self.writer is not None
        self._begun: set[str] = set()

    def write_events(self, events: list[Event]) -> None:
        """One row, or one scalar, each."""
        for name, value, step in events:
            if self.folder is not None:
                self._row(name, value, step)
            if self.writer is not None:
                self.writer.add_scalar(name, value, step)
                self.writer.flush()

    def _row(self, name: str, value: float, step: int) -> None:
        assert self.folder is not None
        path = self.folder / f"{name.replace('/', '_').replace(' ', '_')}.csv"
        with path.open("a", newline="") as file:
            rows = csv.writer(file)
            if name not in self._begun:
                rows.writerow(["step", name.rpartition("/")[2]])
                self._begun.add(name)
            rows.writerow([step, value])


def _place(section: Mapping[str, Any]) -> Path | None:
    if not section.get("enabled"):
        return None
    folder = Path(section.get("output_path") or "", section.get("job_name", "DeepSpeedJobName"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _tensorboard(folder: Path | None) -> Any:
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "tensorboard.enabled: tensorboard is not installed; pip install tensorboard, or use "
            "csv_monitor"
        ) from None
    return SummaryWriter(log_dir=str(folder))


class Clock:
    """Milliseconds of the phases of one update, with the device's queue emptied at their ends."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.ms: dict[str, float] = {}

    def __call__(self, phase: str) -> contextlib.AbstractContextManager[None]:
        """Times the block."""
        return self._timed(phase) if self.enabled else contextlib.nullcontext()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        accelerator.backend().synchronize()
        start = time.perf_counter()
        yield
        accelerator.backend().synchronize()
        self.ms[phase] = self.ms.get(phase, 0.0) + (time.perf_counter() - start) * 1e3

    def take(self) -> dict[str, float]:
        """By phase, since the last call."""
        taken, self.ms = self.ms, {}
        return taken


class FlopsProfiler:
    """Counts the forward passes of update `profile_step` on rank 0 and writes a report."""

    def __init__(self, section: Mapping[str, Any]) -> None:
        self.enabled = bool(section.get("enabled")) and dist.get_rank() == 0
        self.step = max(1, int(section.get("profile_step", 1)))
        self.detailed = bool(section.get("detailed", True))
        self.file: str | None = section.get("output_file")
        depth = int(section.get("module_depth", -1))
        self.depth = 999 if depth < 0 else depth
        self._counts: FlopCounterMode | None = None

    def __call__(self, update: int) -> contextlib.AbstractContextManager[Any]:
        """Counts the block if it is of that update."""
        if not (self.enabled and update == self.step):
            return contextlib.nullcontext()
        if self._counts is None:
            self._counts = FlopCounterMode(display=False)
        return self._counts

    def total(self) -> int:
        """FLOPs of this rank's products, forward; 0 before the step."""
        return 0 if self._counts is None else self._counts.get_total_flops()

    def report(self) -> None:
        """Once, at the end of the counted update."""
        if self._counts is None or not self.enabled:
            return
        text = f"flops profiler: forward {self.total()} FLOPs on this rank, step {self.step}"
        if self.detailed:
            for name, by_kind in self._counts.get_flop_counts().items():
                if name.count(".") < self.depth:
                    text += f"\n{name}: {sum(by_kind.values())}"
        if self.file:
            Path(self.file).write_text(text + "\n")
        else:
            print(text)
        self.enabled = False


def tell(engine: DeepSpeedEngine) -> None:
    """What the config asks for after each update; on rank 0."""
    if dist.get_rank() != 0:
        return
    every, times = engine.settings.steps_per_print, engine.clock.take()
    if every and engine.global_steps % every == 0:
        print(f"step={engine.global_steps}, skipped={engine.skipped_steps}, lr={engine.get_lr()}")
    if times:
        print("time (ms) | " + " | ".join(f"{k}: {v:.2f}" for k, v in times.items()))
    if engine.monitor.enabled:
        seen = engine.global_samples
        events = [("Train/Samples/lr", engine.get_lr()[0], seen)]
        if engine.fp16_enabled():
            events.append(("Train/Samples/loss_scale", engine.scaler.scale, seen))
        events += [(f"Train/Samples/elapsed_time_ms_{p}", ms, seen) for p, ms in times.items()]
        engine.monitor.write_events(events)
    engine.flops_profiler.report()
