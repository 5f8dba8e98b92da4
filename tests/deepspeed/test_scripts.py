"""The same scripts under real DeepSpeed and under us, two processes with different data: losses,
gradient norms, learning rates and final weights.

float32: both sum the same few numbers in another order, so a result may differ by RATIO roundings.
bfloat16: DeepSpeed sums gradients over ranks in bfloat16, we in float32; a weight then may be
rounded to a neighbour, and 12 steps of Adam carry that on. The bound is BF16_RATIO roundings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peer_runs import SCRIPTS, SCRIPTS_4, distance

RATIO, BF16_RATIO = 16, 6
KEYS = ("losses", "norms", "rates")


def allowed(script: str) -> float:
    """Largest relative difference."""
    if "bf16" in script:
        return BF16_RATIO * torch.finfo(torch.bfloat16).eps
    return RATIO * torch.finfo(torch.float32).eps


def compare(script: str, ours: list[Any], real: list[Any]) -> None:
    """Every rank's."""
    for theirs, mine in zip(real, ours, strict=True):
        seen = {k: distance(mine[script][k], theirs[script][k]) for k in KEYS}
        for name, weight in theirs[script]["weights"].items():
            seen[name] = distance(mine[script]["weights"][name], weight)
        assert len(mine[script]["losses"]) >= 12
        far = {k: v for k, v in seen.items() if v > allowed(script)}
        assert not far, f"{script}: {far}, allowed {allowed(script):.1e}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_line_changed(
    script: str, real: tuple[list[Any], Path], ours: tuple[list[Any], Path]
) -> None:
    compare(script, ours[0], real[0])


@pytest.mark.parametrize("script", SCRIPTS_4)
def test_one_line_changed_on_four_processes(script: str, four: tuple[list[Any], list[Any]]) -> None:
    compare(script, four[1], four[0])


def test_ranks_see_different_data(ours: tuple[list[Any], Path]) -> None:
    first, second = (run["zero3"]["losses"] for run in ours[0])
    assert distance(first, second) > 1e-3


@pytest.mark.parametrize(
    ("half", "script", "steps"),
    [("take_over", "resume", 6), ("pipeline_take_over", "pipeline_tied", 7)],
)
def test_goes_on_from_deepspeeds_checkpoint(
    half: str, script: str, steps: int, real: tuple[list[Any], Path], ours: tuple[list[Any], Path]
) -> None:
    for theirs, mine in zip(real[0], ours[0], strict=True):
        for key in KEYS:
            rest = theirs[script][key][steps:]
            assert distance(mine[half][key], rest) <= allowed(script), key
