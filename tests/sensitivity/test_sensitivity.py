"""Tests which rows the sensitivity figures count and report, and that the verdict convicts the
guilty only."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from small_runs import rows

from glm_core.errors import ConfigError
from glm_core.sensitivity import detection, setups
from glm_core.sensitivity.detection import Row, Sensitivity

BLANK = Row(
    name="",
    planted=True,
    kind="eps",
    op="rms_norm",
    setup="glm4",
    held_out=False,
    convicted=True,
    by=["op-by-op"],
    margin=10.0,
    gradient_ratio=0.5,
    op_ratio=10.0,
    envelope_ratio=0.1,
    seconds=1.0,
    mean_loss_difference=1e-5,
    finding="",
)


def made(*changes: dict[str, object]) -> Sensitivity:
    found = [dataclasses.replace(BLANK, **c) for c in changes]  # type: ignore[arg-type]  # made by hand
    return Sensitivity(
        dtype="float32", rows=found, neutral=["idle"], calibration_seconds=1.0, seconds=2.0
    )


RESULT = made(
    {"name": "far", "margin": 30.0, "mean_loss_difference": 0.5},
    {"name": "near", "margin": 2.0, "held_out": True},
    {"name": "free", "convicted": False, "by": [], "margin": 0.7},
    {"name": "innocent", "planted": False, "convicted": False, "by": [], "margin": 0.4},
    {"name": "suspect", "planted": False, "margin": 1.5, "mean_loss_difference": 0.03},
    {"name": "idle", "planted": False, "convicted": False, "margin": 0.9},
    {
        "name": "absent",
        "planted": False,
        "convicted": False,
        "margin": 0.0,
        "skipped": "no compiler",
    },
)


def test_what_is_counted() -> None:
    j = RESULT.to_json()
    assert (j["planted"], j["detected"], j["missed"]) == (3, 2, ["free"])
    assert (j["benign"], j["false_alarms"], j["convicted_benign"]) == (2, 1, ["suspect"])
    assert j["median_margin"] == 16.0
    assert j["largest_benign_margin"] == 1.5
    assert (j["two_percent_rule_detected"], j["two_percent_rule_false_alarms"]) == (1, 1)
    assert j["held_out"] == {"planted": 1, "detected": 1}
    assert j["skipped"] == {"absent": "no compiler"}
    assert json.loads(json.dumps(j))["rows"][0]["name"] == "far"


def test_a_neutral_change_that_is_convicted_is_a_false_alarm() -> None:
    assert made({"name": "idle", "planted": False}).false_alarms == ["idle"]


def test_the_table_names_what_went_wrong_first() -> None:
    lines = RESULT.text().splitlines()
    assert [line.split()[1] for line in lines[1:5]] == ["free", "near", "far", "suspect"]
    assert "missed: free" in lines[-6]
    assert "suspect" in lines[-4]


def test_an_infinite_margin_is_still_json() -> None:
    text = json.dumps(made({"name": "far", "margin": math.inf}).to_json(), allow_nan=False)
    assert json.loads(text)["rows"][0]["margin"] == 1e30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float16"}, "unknown dtype 'float16'; known: bfloat16, float32"),
        ({"names": ["geglu-tan"]}, "did you mean geglu-tanh?"),
        ({"names": ["linear-truncated"]}, "unknown float32 variant"),
    ],
    ids=["dtype", "name", "other-dtype"],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        detection.sensitivity(**arguments)  # type: ignore[arg-type]  # made by hand
    assert message in str(caught.value)


def test_held_out_is_a_third_chosen_by_name() -> None:
    names = [v.name for dtype in setups.DTYPES for v in setups.variants(dtype)]
    share = sum(map(setups.held_out, names)) / len(names)
    assert 0.2 < share < 0.45


def test_loss_difference() -> None:
    @dataclasses.dataclass
    class Losses:
        loss: np.ndarray  # type: ignore[type-arg]  # its dtype is not looked at

    reference, other = Losses(np.array([2.0, 4.0])), Losses(np.array([2.2, 4.0]))
    assert detection.loss_difference(reference, other) == pytest.approx(0.05)  # type: ignore[arg-type]  # made by hand
    broken = Losses(np.array([2.0, np.nan]))
    assert detection.loss_difference(reference, broken) == math.inf  # type: ignore[arg-type]  # made by hand


@pytest.mark.long
def test_bugs_are_convicted_and_benign_changes_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "draw", lambda run, cache_dir: rows(run))
    reports: list[tuple[int, int, str]] = []
    names = ["adamw-beta2-0.999", "rms-norm-dx-without-projection", "swiglu-exp"]
    result = detection.sensitivity(
        "float32",
        steps=1,
        controls=4,
        names=names,
        processes=2,
        progress=lambda done, total, row: reports.append((done, total, row.name)),
    )
    assert [r.name for r in result.rows] == names
    assert result.missed == []
    assert result.false_alarms == []
    assert reports == [(i + 1, 3, name) for i, name in enumerate(names)]
    optimizer, gradient, _ = result.rows
    assert optimizer.by[0] == "op-by-op"
    assert gradient.by[:2] == ["gradient", "op-by-op"]
    assert 0 < gradient.seconds < result.seconds
