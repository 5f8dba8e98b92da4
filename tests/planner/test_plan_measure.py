"""Checks predictions of steps on this machine: planted factors are recovered from times, steps are
predicted, the report compares them. Times themselves are never tested."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from plans import lack

from glm_core.backends import registry
from glm_core.bench import plan_steps
from glm_core.cli import main
from glm_core.distributed.plan import parse
from glm_core.errors import ConfigError
from glm_core.model.presets import preset
from glm_core.planner import cluster, this_machine
from glm_core.planner.this_machine import MESSAGES, SIZES, Machine, Timings

MODEL = preset("glm4-34m")
PLANTED = Machine(
    peak=2e11,
    bandwidth=1e10,
    factors=(1.3, 1.7, 1.0, 0.9, 2e-4),
    messages={name: [1e-4 + size / 1e9 for size in SIZES] for name in MESSAGES},
)


def timed(at: Machine, wanted: Timings, slower: float = 1.0) -> dict[str, list[float]]:
    """Returns the times of processes on a machine that is exactly `at`."""
    bare = {
        "gemm bfloat16": [2.0 * this_machine.SIDE**3 / at.peak],
        "memory read": [this_machine.READ / at.bandwidth],
    }
    for name, times in at.messages.items() if wanted.messages else ():
        bare |= {f"{name} {size}": [t] for size, t in zip(SIZES, times, strict=True)}
    for a in wanted.alone:
        job = this_machine._rank_alone(MODEL, a, wanted.length)
        each = zip(at.factors, this_machine.nominal(job, at), strict=True)
        bare[a.name] = [slower * sum(f * t for f, t in each)]
    for text in wanted.plans:
        parts = this_machine.predicted(at, MODEL, parse(text), wanted.length, wanted.global_batch)
        bare[text] = [slower * sum(parts.values())]
    return bare


def wanted(**more: Any) -> Timings:
    return Timings(preset="glm4-34m", processes=2, length=128, global_batch=8, rounds=1, **more)


def test_planted_factors_are_found() -> None:
    first = timed(PLANTED, wanted(alone=this_machine.steps_alone(MODEL), messages=True))
    found = this_machine.calibrated(first, MODEL, 128)
    assert found.factors == pytest.approx(PLANTED.factors, rel=1e-3)
    assert found.message("sum", SIZES[-1] * 2) == pytest.approx(2 * PLANTED.messages["sum"][-1])
    assert found.message("recv", SIZES[3]) == PLANTED.messages["p2p"][3]
    assert found.message("send", SIZES[3]) == 0


def test_a_plan_costs_what_its_ranks_do() -> None:
    one, two = (this_machine.predicted(PLANTED, MODEL, parse(p), 128, 8) for p in ("dp=2", "tp=2"))
    assert one["matrix products"] == pytest.approx(two["matrix products"])
    assert two["loss"] == pytest.approx(one["loss"] * 4 / 3)  # its logits twice
    assert two["optimizer"] < one["optimizer"]
    shared = this_machine.predicted(PLANTED, MODEL, parse("dp=2,zero=1"), 128, 8)
    assert shared["optimizer"] < one["optimizer"]
    cut = this_machine.predicted(PLANTED, MODEL, parse("pp=2,micro_batches=4"), 128, 8)
    assert cut["bubble"] > 0 == one["bubble"]
    assert cut["messages"] < two["messages"] < one["messages"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes on a machine that is as planted, a fifth slower the second time."""
    monkeypatch.setattr(plan_steps, "measure", lambda w: timed(PLANTED, w, 1.2 if w.plans else 1.0))


@pytest.mark.usefixtures("machine")
def test_command_line_predicts_then_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "here.json"
    assert main(["plan", "measure", "--json", "--out", str(path)]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    plans = [text for text in this_machine.PLANS if not lack(text)]
    assert [r["plan"] for r in report["rows"]] == plans
    assert err.count("predicted: ") == len(plans)
    assert err.count("left out: ") == len(this_machine.PLANS) - len(plans)
    assert report["drift"] == pytest.approx(1.2)
    for row in report["rows"]:
        assert row["error"] == pytest.approx(1 / 1.2 - 1, abs=1e-3)
        assert row["error_without_drift"] == pytest.approx(0, abs=1e-3)
    found = cluster.load(path)
    assert (found.chips, found.peak) == (2, pytest.approx(2e11))
    assert main(["plan", "measure", "--plan", "dp=2"]) == 0
    assert "median |error| 16.7%" in capsys.readouterr().out
    arguments = ["--cluster", str(path), "--preset", "tiny", "--global-batch", "8", "--seq", "128"]
    assert main(["plan", *arguments, "--tokens", "1e6"]) == 0


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["--plan", "dp=4"], "tp * pp * dp = 4 processes, started 2"),
        (["--plan", "tq=2"], "did you mean tp?"),
        (["--global-batch", "3"], "does not divide global_batch=3"),
        (["--rounds", "0"], "--rounds=0 must be at least 1"),
    ],
)
@pytest.mark.usefixtures("machine")
def test_bad_input_is_one_line_and_exit_2(
    words: list[str], fact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "measure", *words]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert fact in errors[-1]


@pytest.mark.skipif(not registry.probe("cpu").ok, reason="backend cpu is not built")
def test_two_processes_do_a_step() -> None:
    timings = Timings(
        preset="tiny",
        processes=2,
        length=16,
        global_batch=2,
        rounds=1,
        plans=("dp=2",),
        alone=this_machine.steps_alone(preset("tiny"))[2:3],
    )
    times = plan_steps.measure(timings)
    assert set(times) == {"gemm bfloat16", "memory read", timings.alone[0].name, "dp=2"}
    with pytest.raises(ConfigError, match="does not divide global_batch=1"):
        this_machine.checked_plans(["dp=2"], MODEL, dataclasses.replace(timings, global_batch=1))
