"""Decides whether two loss curves are the same: `run` does it all; `calibrate`, `record`, `compare`
and `bisect` are its parts. Names are imported on first use, because `compare` needs no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from glm_core.config import RunConfig, TrainConfig

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
    "main_job",
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


def main_job() -> RunConfig:
    """Returns the config of a run that asks for no other: the preset tiny, and as many steps as its
    loss needs to flatten. A step has as many tokens as in the experiments that the verdict's
    sensitivity was measured with, in two micro-batches."""
    from glm_core.model.presets import preset

    train = TrainConfig(steps=100, micro_batch=2, global_batch=4)
    return RunConfig(model=preset("tiny"), train=train)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
