"""Tells how much memory this process has held, and how much more it can have."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def resident_peak_bytes() -> int:
    """Returns the largest resident set of this process so far; 0 where Python cannot ask the system
    (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_bytes(device: torch.device) -> int | None:
    """Returns the bytes that a process can still allocate on a device; None where its runtime does
    not tell."""
    if device.type == "cpu":
        return host_free_bytes()
    module: Any = getattr(torch, device.type, None)  # none for the device `meta`
    if not hasattr(module, "mem_get_info"):
        return None
    free: int = module.mem_get_info(device)[0]
    return free


def host_free_bytes(root: Path = Path("/")) -> int | None:
    """Returns the bytes of main memory that this process can still allocate: what the machine has
    available, or less where a container's limit (cgroup 1 or 2) leaves less. None where the system
    does not tell (not Linux). root: the file system's root, another one in tests."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        [available] = [int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable:")]
    except (OSError, ValueError):
        return None
    return max(min([available, *_cgroups_free(root)]), 0)


def _cgroups_free(root: Path) -> Iterator[int]:
    """Yields what each limit of this process leaves: that of its own group, and of those around."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        group = top / path.lstrip("/")
        # inside a container the path may be the host's, which is not visible: its own limit is at
        # the top
        for folder in (group, *group.parents):
            free = _cgroup_free(folder, *names)
            if free is not None:
                yield free
            if folder == top:
                break


def _cgroup_free(folder: Path, limit: str, usage: str) -> int | None:
    """Returns what a group's limit leaves, None without a limit. Cached file pages are given back
    before the limit is met, so they count as free."""
    try:
        most = (folder / f"memory.{limit}").read_text(encoding="utf-8").strip()
        used = int((folder / f"memory.{usage}").read_text(encoding="utf-8"))
        facts = dict(
            x.split() for x in (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
        )
    except (OSError, ValueError):
        return None
    if most == "max":
        return None
    prefix = "total_" if "total_inactive_file" in facts else ""
    cached = sum(int(facts.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    return int(most) - used + cached
