"""The rate of false alarms: its interval, and which honest changes a model is judged with."""

from __future__ import annotations

import pytest

from glm_core.faults.catalogue import BENIGN
from glm_core.sensitivity import honest


@pytest.mark.parametrize(
    ("alarms", "judged", "low", "high"),
    [(0, 300, 0.0, 0.01222), (3, 300, 0.002067, 0.028945), (5, 5, 0.47818, 1.0)],
)
def test_the_interval_is_clopper_and_pearsons(
    alarms: int, judged: int, low: float, high: float
) -> None:
    assert honest.interval(alarms, judged) == pytest.approx((low, high), rel=1e-3)


def test_every_model_is_judged_with_backends_ways_to_run_and_kernels() -> None:
    seen = set()
    for seed in range(6):
        run = honest.model_of(seed)
        chosen = honest.changes(seed, run.train.dtype)
        assert len(chosen) == len({b.name for b in chosen}) == honest.PER_MODEL
        assert {b.registered for b in chosen} == {"", "cpu", "onnxrt"}
        assert all(b in BENIGN for b in chosen)
        seen.add((run.model.norm, run.train.dtype))
    assert len(seen) == len(honest.MODELS) + 1  # three setups in two dtypes, two of the same norm
