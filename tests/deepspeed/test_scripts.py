"""Runs scripts under us, on two processes with different data, and compares losses, gradient norms,
learning rates and final weights with those of real DeepSpeed: recorded (witness.py) or live.

The difference that is allowed is measured, not set. Control scripts run once more with the rows of
each micro-batch in the other order, which changes roundings alone, and in bfloat16 with gradients
summed over ranks in bfloat16, as DeepSpeed does and we do not. The project's rule then holds: at
most RATIO times the largest of these spreads in a dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peer_runs import OURS_4, SCRIPTS, SCRIPTS_4, differences, distance
from real_deepspeed import Live, Recorded
from witness import LISTS

RATIO = 2
Spread = dict[torch.dtype, float]


def allowed(script: str, spread: Spread) -> float:
    """Returns the largest relative difference that is allowed."""
    return RATIO * spread[torch.bfloat16 if "bf16" in script else torch.float32]


def compare(script: str, ours: list[Any], real: list[dict[str, Any]], spread: Spread) -> None:
    """Compares what every rank saw."""
    for theirs, mine in zip(real, ours, strict=True):
        assert len(mine[script]["losses"]) >= 12
        seen = differences(mine[script], theirs)
        limit = allowed(script, spread)
        far = {k: v for k, v in seen.items() if v > limit}
        assert not far, f"{script}: {far}, allowed {limit:.1e}"


def test_the_spread_is_of_roundings(spread: Spread) -> None:
    for dtype, found in spread.items():
        assert 0 < found < 16 * torch.finfo(dtype).eps, dtype


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_line_changed(
    script: str, real: Live | Recorded, ours: tuple[list[Any], Path], spread: Spread
) -> None:
    compare(script, ours[0], real.ranks(script), spread)


@pytest.mark.parametrize("script", SCRIPTS_4)
def test_one_line_changed_on_four_processes(
    script: str, real: Live | Recorded, spread: Spread, ours_on_four: list[Any]
) -> None:
    compare(script, ours_on_four, real.ranks(script), spread)


def test_ranks_see_different_data(ours: tuple[list[Any], Path]) -> None:
    first, second = (run["zero3"]["losses"] for run in ours[0])
    assert distance(first, second) > 1e-3


@pytest.mark.parametrize(
    ("half", "script", "steps"),
    [
        ("take_over", "resume", 6),
        ("pipeline_take_over", "pipeline_tied", 7),
        ("replicas_take_over", "pipeline_replicas", 6),
    ],
)
def test_goes_on_from_deepspeeds_checkpoint(
    half: str,
    script: str,
    steps: int,
    real: Live | Recorded,
    ours: tuple[list[Any], Path],
    ours_on_four: list[Any],
    spread: Spread,
) -> None:
    mine = ours_on_four if half in OURS_4 else ours[0]
    for theirs, rank in zip(real.ranks(script), mine, strict=True):
        for key in LISTS:
            rest = theirs[key][steps:]
            assert distance(rank[half][key], rest) <= allowed(script, spread), key
