"""What one process does about bad steps and tells of a run, many do under a plan: all ranks decide
alike, rank 0 says so once."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import elastic_workers
import pytest
from plans import needs
from ranks import Job, Ranks

from glm_core.training.live import PREFIX
from glm_core.training.run import run

BAD = 36
"""a sequence of the fifth step"""


def planned(ranks: Ranks, tmp_path: Path, plan: str, policy: dict[str, Any], **more: int) -> Job:
    options = {"bad": BAD, "port": 0} | more
    return ranks.run(
        "elastic_workers.run_under",
        2,
        plan,
        str(tmp_path / "job"),
        policy,
        *options.values(),
        folder=tmp_path,
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


ZERO = "dp=2,zero=2,micro_batches=2"


@pytest.mark.parametrize(
    ("plan", "action"),
    [
        pytest.param(ZERO, "rollback", marks=needs(ZERO)),
        ("tp=2", "skip"),
        ("pp=2,micro_batches=2", "skip"),
    ],
)
def test_bad_steps_end_as_on_one_process(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str], plan: str, action: str
) -> None:
    config = elastic_workers.policy_config(nonfinite=action)
    run(config, tmp_path / "alone", sampler=elastic_workers.Rows(BAD))
    job = planned(ranks, tmp_path, plan, {"nonfinite": action})
    assert job.codes == [0, 0], job.told
    alone, both = lines(tmp_path / "alone"), lines(tmp_path / "job")
    assert [(x["step"], x["skipped"]) for x in both] == [(x["step"], x["skipped"]) for x in alone]
    for one, two in zip(alone, both, strict=True):
        for key in ("loss", "grad_norm", "lr"):
            want = None if one[key] is None else pytest.approx(one[key], rel=1e-5)
            assert two[key] == want, (one["step"], key)
    said = f"policy.nonfinite={action}: step 5: the loss is "
    assert capsys.readouterr().err.count(said) == 1
    assert [output.count(said) for output in job.outputs] == [1, 0], job.told
    told = next(line for line in job.outputs[0].splitlines() if said in line)
    assert "first not finite: op " in told
    assert " on rank " in told


def test_without_a_policy_every_rank_stops_and_says_why(ranks: Ranks, tmp_path: Path) -> None:
    job = planned(ranks, tmp_path, "dp=2", {})
    assert job.codes == [1, 1]
    for output in job.outputs:
        assert "TrainingError: step 5: the loss is nan; first not finite: op " in output
    assert [x["step"] for x in lines(tmp_path / "job")] == [1, 2, 3, 4]


def test_figures_and_stragglers_of_a_job(ranks: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    job = planned(ranks, tmp_path, "dp=2", {}, bad=-1, port=port)
    assert job.codes == [0, 0], job.told
    found = json.loads((tmp_path / "job/stragglers.json").read_text())
    assert [r["step"] for r in found["reports"]] == [4, 8]
    # a saving thread's waits, in step 4, are not the rank's
    assert all(own > 0 for r in found["reports"] for own in r["own_s"].values())
    assert found["summary"] in job.outputs[0]
    assert found["summary"] not in job.outputs[1]
    served = dict(x.rsplit(" ", 1) for x in job.outputs[0].splitlines() if x.startswith(PREFIX))
    last = found["reports"][1]
    assert float(served[f"{PREFIX}slowest_rank"]) == last["slowest"]
    assert float(served[f"{PREFIX}slowest_rank_ratio"]) == pytest.approx(last["ratio"])
    assert float(served[f"{PREFIX}rank_variation_ratio"]) == pytest.approx(last["variation"])
    assert float(served[f"{PREFIX}step"]) == 8
    assert float(served[f"{PREFIX}tokens_total"]) == 8 * 8 * elastic_workers.MODEL.max_length
    assert float(served[f"{PREFIX}memory_peak_bytes"]) > 1e7
    events = EventAccumulator(str(tmp_path / "job/tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("slowest_rank")] == [4, 8]
    assert [e.step for e in events.Scalars("mfu_ratio")] == list(range(1, 9))
