"""The rate of false alarms: its interval, and which honest changes a model is judged with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glm_core.faults.catalogue import BENIGN
from glm_core.sensitivity import honest
from glm_core.sensitivity.detection import Row


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


def test_a_stopped_measurement_goes_on_after_the_rows_that_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    judged: list[str] = []
    stop_after = [3]

    def judge(change: Any, run: Any, calibration: Any) -> Row:
        if len(judged) in stop_after:
            raise OSError("stopped")
        judged.append(change.name)
        ratios = dict.fromkeys(("margin", "gradient_ratio", "op_ratio", "envelope_ratio"), 0.5)
        facts = {"planted": False, "convicted": False, "held_out": False, "by": [], "finding": ""}
        times = {"seconds": 1.0, "mean_loss_difference": 0.0}
        texts = {"name": change.name, "kind": "benign", "op": change.op, "setup": ""}
        return Row(**texts, **facts, **ratios, **times)  # type: ignore[arg-type]  # mixed values

    monkeypatch.setattr(honest, "draw", lambda *_: None)
    monkeypatch.setattr(honest.align, "calibrate", lambda *_, **__: None)
    monkeypatch.setattr(honest, "judge", judge)
    kept = tmp_path / "rows.jsonl"
    with pytest.raises(OSError, match="stopped"):
        honest.false_alarms(20, kept=kept)
    with kept.open("a") as file:
        file.write('\n{"name": "cut o')
    stop_after.clear()
    result = honest.false_alarms(20, kept=kept)
    assert [r.name for r in result.rows] == judged  # none of them twice in one model
    assert len({(r.setup, r.name) for r in result.rows}) == len(judged) == 2 * honest.PER_MODEL
