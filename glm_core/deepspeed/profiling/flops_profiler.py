"""Counts the FLOPs of the forward passes of one update."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode


class ForwardFlops:
    """Counts the forward passes of update `profile_step` on rank 0 and writes a report. It is no
    `FlopsProfiler`: DeepSpeed's takes a model, this one the config's `flops_profiler` section."""

    def __init__(self, section: Mapping[str, Any]) -> None:
        self.enabled = bool(section.get("enabled")) and dist.get_rank() == 0
        self.step = max(1, int(section.get("profile_step", 1)))
        self.detailed = bool(section.get("detailed", True))
        self.file: str | None = section.get("output_file")
        depth = int(section.get("module_depth", -1))
        self.depth = 999 if depth < 0 else depth
        self._counts: FlopCounterMode | None = None

    def __call__(self, update: int) -> contextlib.AbstractContextManager[Any]:
        """Counts the block if it belongs to the update that is profiled."""
        if not (self.enabled and update == self.step):
            return contextlib.nullcontext()
        if self._counts is None:
            self._counts = FlopCounterMode(display=False)
        return self._counts

    def total(self) -> int:
        """Returns the FLOPs of this rank's matrix products; 0 before the profiled update."""
        return 0 if self._counts is None else self._counts.get_total_flops()

    def report(self) -> None:
        """Writes the report once, at the end of the profiled update."""
        if self._counts is None or not self.enabled:
            return
        text = f"flops profiler: forward {self.total()} FLOPs on this rank, step {self.step}"
        if self.detailed:
            for name, by_kind in self._counts.get_flop_counts().items():
                if name.count(".") < self.depth:
                    text += f"\n{name}: {sum(by_kind.values())}"
        if self.file:
            Path(self.file).write_text(text + "\n", encoding="utf-8")
        else:
            print(text)
        self.enabled = False
