"""A candidate under a plan is held to the reference's run on one process: `align run --plan`."""

from __future__ import annotations

from pathlib import Path

import markov
import pytest
from ranks import Ranks

from glm_core import align
from glm_core.align import explanation, planned_run
from glm_core.errors import ConfigError


@pytest.fixture(scope="module")
def calibration() -> align.Calibration:
    config = markov.config("float32", steps=4)
    return align.calibrate(config, sampler=markov.Markov, controls=4, capture_steps=(2,))


@pytest.mark.parametrize("bug", ["", "mean_over_ranks", "same_rows"])
def test_a_plan_is_held_to_one_process(
    bug: str, calibration: align.Calibration, ranks: Ranks, tmp_path: Path
) -> None:
    module, arguments = (
        ("elastic_workers.align_with", [bug]) if bug else (f"{planned_run.__name__}.work", [])
    )

    def start(world: int, folder: Path) -> None:
        job = ranks.run(module, world, *arguments, str(folder), folder=tmp_path)
        assert job.codes == [0] * world, job.told

    cal = calibration
    trace = planned_run.record_plan(cal, "reference", "dp=2", start=start)
    assert len(trace.loss) == cal.config.train.steps
    pair = align.compare(cal.reference, trace)
    if not bug:
        assert pair.verdict == "aligned"
        return
    assert pair.max_gradient_ratio > 1
    assert pair.max_envelope_ratio > 1
    found = dict(explanation.details(pair, trace))
    assert "a collective" in found["usually"]
    assert found["rerun"].endswith("--backends reference --plan dp=2")


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not divide num_heads=2"):
        align.run(markov.config("float32"), ["reference"], plans=["tp=4"], out_dir=tmp_path)
