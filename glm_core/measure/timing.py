"""Times contestants in turn, with medians and spread, and describes the machine."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from glm_core import environment


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """The times of one contestant."""

    seconds: tuple[float, ...]
    """of each round"""

    @property
    def median_s(self) -> float:
        """The median of the rounds, the figure to quote."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The interquartile range over the median: how noisy the machine was."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median_s


def interleave(
    contestants: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    rest_s: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times every contestant once in each round, in turn, so that a slow spell of a shared machine
    hits all alike. Rests `rest_s` before each, because other engines' threads spin on for a
    while. With `clock=time.process_time` it counts the CPU time of all threads instead."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(warmup + rounds):
        for name, run in contestants.items():
            time.sleep(rest_s)
            start = clock()
            run()
            if i >= warmup:
                seconds[name].append(clock() - start)
        if sys.stderr.isatty():
            print(f"\rround {i + 1}/{warmup + rounds}", end="\r", file=sys.stderr, flush=True)
    return {name: Timing(seconds=tuple(s)) for name, s in seconds.items()}


def ratio(slow: Timing, fast: Timing) -> dict[str, float]:
    """Returns how many times faster `fast` is: the median and quartiles of the ratios of each
    round."""
    each = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    low, middle, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    return {"ratio": middle, "low": low, "high": high}


def commit() -> str:
    """Returns the checkout's commit, shortened; "" outside of one or without git."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(
            words, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """Describes this machine: CPU, the instruction set in use, threads, versions, commit."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": environment.isa() or torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit() or "unknown",
    }


def cpu_name() -> str:
    """Returns the CPU's model name from /proc/cpuinfo, else what platform knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine() or "unknown")


def gemm(dtype: torch.dtype, size: int = 1024) -> Callable[[], Any]:
    """Returns a size x size x size matrix product, the machine's ceiling, as a contestant. It uses
    the faster of the libraries that torch has for it; says on stderr which it lacks on this CPU."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    libraries: dict[str, Callable[[], Any]] = {"mm": lambda: torch.mm(a, b)}
    try:
        onednn_product(a, b)
    except (AttributeError, RuntimeError) as error:  # torch without oneDNN; a CPU it has none for
        reason = str(error).partition("\n")[0]
        print(f"gemm {dtype}: no oneDNN product on this CPU ({reason})", file=sys.stderr)
    else:
        libraries["onednn"] = lambda: onednn_product(a, b)
    timing = interleave(libraries, 5)
    return libraries[min(libraries, key=lambda name: timing[name].median_s)]


def onednn_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns `a` times the transpose of `b`, computed by oneDNN."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return product


def gemm_flops(size: int = 1024) -> int:
    """Returns the floating-point operations of one `gemm` call."""
    return 2 * size**3
