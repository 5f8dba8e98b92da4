"""Reports a run while it goes on: a JSON line and TensorBoard scalars per step, a progress bar on
stderr."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from glm_core.errors import ConfigError
from glm_core.training.live import Live


class Metrics:
    """Writes `metrics.jsonl` in the run's folder, one line per step with its number under `step`.
    Numbers that are not finite become null. Lines after step `done` are dropped first, so that a
    resumed run has every step once."""

    def __init__(
        self, folder: Path, done: int, tensorboard: bool = False, live: Live | None = None
    ) -> None:
        """live: the figures it derives go to TensorBoard too. Raises ConfigError where TensorBoard
        is wanted and not installed."""
        self.path = path = folder / "metrics.jsonl"
        self.writer = _writer(folder, done) if tensorboard else None
        self.live = live
        keep = kept_bytes(path.read_bytes(), done) if path.exists() else 0
        self.file = path.open("ab")
        self.file.truncate(keep)

    def write(self, values: dict[str, Any]) -> None:
        """Adds one step; on return the line is flushed to the operating system."""
        plain = {k: _plain(v) for k, v in values.items()}
        self.file.write(json.dumps(plain, allow_nan=False).encode() + b"\n")
        self.file.flush()
        shown = plain | (self.live.update(values) if self.live is not None else {})
        if self.writer is not None:
            for key, value in shown.items():
                if key != "step" and value is not None and not isinstance(value, list):
                    self.writer.add_scalar(key, value, values["step"])

    def ranks(self, step: int, values: dict[str, float]) -> None:
        """Adds the comparison of the ranks' times in a timed step. It goes to TensorBoard and the
        endpoint, not into the file, which has one line per step."""
        if self.live is not None:
            self.live.ranks(values)
        if self.writer is not None:
            for key, value in values.items():
                self.writer.add_scalar(key, value, step)

    def rewind(self, done: int) -> None:
        """Drops the lines after step `done`: the run has gone back to it."""
        self.file.truncate(kept_bytes(self.path.read_bytes(), done))

    def sync(self) -> None:
        """Returns when all lines are on the disk; before a checkpoint, which promises them."""
        os.fsync(self.file.fileno())
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """Closes the files."""
        self.file.close()
        if self.writer is not None:
            self.writer.close()


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def kept_bytes(lines: bytes, done: int) -> int:
    """Returns the length of the lines up to step `done`; a line cut short by a kill does not
    count."""
    size = 0
    for line in lines.splitlines(keepends=True):
        if not line.endswith(b"\n") or json.loads(line)["step"] > done:
            break
        size += len(line)
    return size


def _writer(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"TensorBoard events: {error}; pip install tensorboard, or run without them"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)


class Progress:
    """Draws `[######..........]  120/300  loss 5.61  ...` on stderr: redrawn on a terminal,
    elsewhere a line every twentieth of the run."""

    def __init__(self, total: int, stream: TextIO | None = None, width: int = 30) -> None:
        self.total, self.width = total, width
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.drawn = 0.0

    def update(self, done: int, text: str) -> None:
        """Shows that `done` of `total` are done; on a terminal at most ten times a second."""
        now, last = time.monotonic(), done == self.total
        if self.live and (last or now - self.drawn > 0.1):
            self.drawn = now
            bar = "#" * (done * self.width // self.total)
            end = "\n" if last else ""
            print(
                f"\r\x1b[K[{bar:.<{self.width}}] {done}/{self.total}  {text}",
                end=end,
                file=self.stream,
                flush=True,
            )
        elif not self.live and (last or done % max(1, self.total // 20) == 0):
            print(f"{done}/{self.total}  {text}", file=self.stream, flush=True)
