"""Reports the progress of a run after each update: a printed line, CSV files, TensorBoard
events."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from glm_core.errors import ConfigError


class Event(NamedTuple):
    """One value to be plotted."""

    name: str
    value: float
    samples: int
    """seen so far"""


class Progress(NamedTuple):
    """Where a run stands after an update."""

    updates: int
    """skipped ones included"""
    skipped: int
    samples: int
    rates: list[float]
    """one learning rate per parameter group"""
    loss_scale: float | None
    """None where the run does not use float16"""
    phase_ms: dict[str, float]
    """milliseconds of this update by phase; empty where phases are not timed"""

    def events(self) -> list[Event]:
        """Returns what DeepSpeed's monitors plot, under its names."""
        values = {"lr": self.rates[0]}
        if self.loss_scale is not None:
            values["loss_scale"] = self.loss_scale
        values |= {f"elapsed_time_ms_{phase}": ms for phase, ms in self.phase_ms.items()}
        return [Event(f"Train/Samples/{name}", v, self.samples) for name, v in values.items()]


class Monitor:
    """Reports on rank 0: prints progress, and writes what the config's csv_monitor (with
    DeepSpeed's files and columns) and tensorboard sections enable."""

    def __init__(self, config: Mapping[str, Any], updates_per_print: int | None = None) -> None:
        """updates_per_print: None or 0 prints no progress. Raises ConfigError where TensorBoard is
        enabled but not installed."""
        self.updates_per_print = updates_per_print
        self.folder: Path | None = None
        self.writer: Any = None
        if dist.get_rank() == 0:
            self.folder = _log_folder(config.get("csv_monitor", {}))
            self.writer = _tensorboard(_log_folder(config.get("tensorboard", {})))
        self.enabled = self.folder is not None or self.writer is not None
        self._with_header: set[str] = set()

    def report(self, progress: Progress) -> None:
        """Prints and writes what the config asks for; does nothing on other ranks than 0."""
        if dist.get_rank() != 0:
            return
        if self.updates_per_print and progress.updates % self.updates_per_print == 0:
            print(f"step={progress.updates}, skipped={progress.skipped}, lr={progress.rates}")
        if progress.phase_ms:
            times = (f"{phase}: {ms:.2f}" for phase, ms in progress.phase_ms.items())
            print("time (ms) | " + " | ".join(times))
        if self.enabled:
            self.write_events(progress.events())

    def write_events(self, events: list[Event]) -> None:
        """Writes a CSV row and a TensorBoard scalar for each event."""
        for name, value, samples in events:
            if self.folder is not None:
                self._write_row(self.folder, name, value, samples)
            if self.writer is not None:
                self.writer.add_scalar(name, value, samples)
                self.writer.flush()

    def _write_row(self, folder: Path, name: str, value: float, samples: int) -> None:
        path = folder / f"{name.replace('/', '_').replace(' ', '_')}.csv"
        with path.open("a", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            if name not in self._with_header:
                rows.writerow(["step", name.rpartition("/")[2]])
                self._with_header.add(name)
            rows.writerow([samples, value])


def _log_folder(section: Mapping[str, Any]) -> Path | None:
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
