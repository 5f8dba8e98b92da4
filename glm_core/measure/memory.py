"""Tells how much memory this process has held."""

from __future__ import annotations

import sys


def resident_peak_bytes() -> int:
    """Returns the largest resident set of this process so far; 0 where Python cannot ask the system
    (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
