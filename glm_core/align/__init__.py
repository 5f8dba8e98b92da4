"""Decides whether two loss curves are the same: `run` does it all; `calibrate`, `record`, `compare`
and `bisect` are its parts. Names are imported on first use, because `compare` needs no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm_core.align.bisection import Bisection, bisect
    from glm_core.align.calibration import Calibration, calibrate
    from glm_core.align.jobs import RunResult, run
    from glm_core.align.recording import record
    from glm_core.align.rerun_command import CallFilter
    from glm_core.align.verdict import Finding, Pair, compare

__all__ = [
    "Bisection",
    "Calibration",
    "Finding",
    "CallFilter",
    "Pair",
    "RunResult",
    "bisect",
    "calibrate",
    "compare",
    "record",
    "run",
]

NUM_CONTROLS = 6
"""control runs of the reference, unless another number is asked for"""
MIN_CONTROLS = 4
"""the fewest from which the spread of honest runs can be estimated"""

_MODULE = {
    "Bisection": "bisection",
    "bisect": "bisection",
    "CallFilter": "rerun_command",
    "Calibration": "calibration",
    "calibrate": "calibration",
    "RunResult": "jobs",
    "run": "jobs",
    "record": "recording",
    "Finding": "verdict",
    "Pair": "verdict",
    "compare": "verdict",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
