"""The verdict on programs of several ranks: what a collective delivers is judged by what the ranks
sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from glm_core import verdict
from glm_core.distributed import messages
from glm_core.faults.collectives import COLLECTIVE_FAULTS, TRANSFER_FAULTS
from glm_core.verdict import watching
from glm_core.versions import lack_of

LACK = lack_of("named_reductions", "to plant wrong reductions")
pytestmark = pytest.mark.skipif(bool(LACK), reason=LACK)
NAMES_WHAT_IS_WRONG = {
    "averages where it should sum": "averages where it should sum",
    "the last rank's message is left out": "the message of rank 1 is left out",
    "the last element is lost": "the first at ",
    "messages rounded to bfloat16": "combines messages rounded to bfloat16",
    "ranks keep their own": "this rank's own message",
    "the ranks' parts change places": "another than belongs here",
    "only the root has it": "not what was sent",
}

TRANSFERS_ARE_WRONG = {
    "the second half of the message is lost": (
        "cut off: the last 24 of 48 elements are not what was sent"
    ),
    "sends the message before again": "the message before this one",
    "the message arrives in another buffer": "nothing arrived: the buffer is as it was",
    "receives from another rank": "what rank {other} sent, where rank {belongs}'s belongs",
}


@pytest.fixture(scope="module")
def both(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Returns what each of two ranks reports."""
    folder = tmp_path_factory.mktemp("ranks")
    job = ranks.run("verdict_workers.everything", 2, folder=folder)
    assert job.codes == [0, 0], job.told
    return [json.loads(o.partition("RESULT ")[2].splitlines()[0]) for o in job.outputs]


def test_every_collective_is_judged_by_what_the_ranks_sent(both: list[dict[str, Any]]) -> None:
    for rank, own in enumerate(both):
        assert len(own["honest"]) == 3
        for report in own["honest"].values():
            assert report["verdict"] == "honest", report["sentence"]
            assert report["program"] == f"program, rank {rank} of 2"
            assert not report["not_judged"]
            assert sum("c10d" in row["operator"] for row in report["operators"]) == 17


def test_planted_collectives_are_named_with_what_is_wrong(both: list[dict[str, Any]]) -> None:
    planted = both[1]["planted"]  # of a broadcast, the root has what it should
    assert len(planted) == 2 * len(COLLECTIVE_FAULTS) - 4
    for fault, findings in planted.items():
        operator, _, name = fault.partition(": ")
        [(found, test)] = findings
        assert found == operator
        assert NAMES_WHAT_IS_WRONG[name.rpartition(" ")[0]] in test, fault


def test_an_all_reduce_of_ddp_that_averages_is_named(both: list[dict[str, Any]]) -> None:
    for own in both:
        assert own["ddp"]["verdict"] == "honest", own["ddp"]["sentence"]
        assert "nothing was left out" in own["ddp"]["sentence"]
        [finding] = own["wrong"]["findings"]
        assert finding["operator"] == "c10d::allreduce_"
        assert finding["test"] == "averages where it should sum"
        assert finding["phase"] == "backward"


def test_rank_0_gives_one_verdict_on_all_ranks(both: list[dict[str, Any]]) -> None:
    job = both[0]["job"]
    assert both[1]["job"] is None
    assert job["program"] == "program, 2 ranks"
    [finding] = job["findings"]
    assert (finding["operator"], sorted(finding["ranks"])) == ("c10d::allreduce_", [0, 1])
    assert len(job["ranks"]) == 2
    assert job["num_tests"] == sum(own["wrong"]["num_tests"] for own in both)
    assert job["false_alarm_rate"] == pytest.approx(1e-3)


def test_ranks_that_do_not_watch_are_not_waited_for_twice(both: list[dict[str, Any]]) -> None:
    for name in ("alone", "alone again"):
        [left] = both[0][name]["not_judged"]
        assert "watch the same steps on every rank" in left["reason"]


def test_process_groups_that_no_operator_calls_are_noted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Vendors(dist.ProcessGroup):
        pass

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    groups = {Vendors(0, 1): None, dist.ProcessGroup(0, 1): None}
    monkeypatch.setattr(type(messages.c10d._world), "pg_map", groups)
    assert [name.rpartition(".")[2] for name in messages.unseen_groups()] == ["Vendors"]
    monkeypatch.undo()
    monkeypatch.setattr(watching, "unseen_groups", lambda: ["Vendors"])
    with verdict.watch(steps=(1,)) as watch:
        torch.ones(3).exp()
    [note] = watch.report().notes
    assert note.startswith("the process group Vendors is written in Python")


@pytest.fixture(scope="module")
def three(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Returns what each of three ranks reports that send each other messages."""
    job = ranks.run("verdict_transfers.everything", 3, folder=tmp_path_factory.mktemp("transfers"))
    assert job.codes == [0, 0, 0], job.told
    return [json.loads(o.partition("RESULT ")[2].splitlines()[0]) for o in job.outputs]


def received(report: dict[str, Any]) -> int:
    rows = report["operators"]
    return sum(row["calls"] for row in rows if "recv" in row["operator"])


def test_messages_between_two_ranks_are_judged_by_what_was_sent(
    three: list[dict[str, Any]],
) -> None:
    for rank, own in enumerate(three):
        for report in own["honest"].values():
            assert report["verdict"] == "honest", report["sentence"]
            assert {u["operator"] for u in report["not_judged"]} <= {"aten::randn"}
        assert received(own["honest"]["float32"]) == 4
        assert received(own["honest"]["one by one"]) == (0, own["functional"] + 2, 2)[rank]


def test_planted_messages_are_named_with_what_is_wrong(three: list[dict[str, Any]]) -> None:
    for rank, own in enumerate(three):
        assert len(own["planted"]) == 2 * len(TRANSFER_FAULTS)
        for fault, findings in own["planted"].items():
            [(operator, test)] = findings
            assert operator == "c10d::recv_"
            name = fault.partition(": ")[2].rpartition(" ")[0]
            belongs, other = sorted({0, 1, 2} - {rank})
            assert test == TRANSFERS_ARE_WRONG[name].format(other=other, belongs=belongs)


def test_a_pipelines_messages_are_judged(three: list[dict[str, Any]]) -> None:
    for own in three[:2]:
        assert own["pipeline"]["verdict"] == "honest", own["pipeline"]["sentence"]
        assert received(own["pipeline"]) == 4  # activations or gradients of four micro-batches
        [finding] = own["wrong pipeline"]["findings"]
        assert (finding["operator"], finding["calls"]) == ("c10d::recv_", 4)


def test_messages_that_cross_steps_are_told_apart(three: list[dict[str, Any]]) -> None:
    crossing = three[1]["crossing"]
    assert crossing["verdict"] == "honest", crossing["sentence"]
    [left] = crossing["not_judged"]
    assert (left["calls"], received(crossing)) == (1, 1)
    assert left["reason"] == "its sender did not capture the step in which it was sent"


def test_the_command_runs_a_script_of_several_ranks_as_often_as_it_needs(
    ranks: Ranks, tmp_path: Path
) -> None:
    job = ranks.run("verdict_commands.everything", 2, folder=tmp_path, timeout_s=300.0)
    assert job.codes == [0, 0], job.told
    first, other = (json.loads(o.partition("RESULT ")[2].splitlines()[0]) for o in job.outputs)
    assert other == {
        "with": [0, None],
        "refused": [2, None],
        "record": [0, None],
        "against": [0, None],
    }
    code, whole = first["with"]
    assert (code, whole["plain"]["verdict"]) == (1, "honest")
    [finding] = whole["findings"]
    assert (finding["test"], sorted(finding["ranks"])) == ("averages where it should sum", [0, 1])
    assert first["refused"][0] == 2
    assert "put {rank} into its name" in job.outputs[0]
    code, whole = first["record"]
    assert (code, whole["curve"]["missing"]) == (0, "it is recorded here, and judged by --against")
    code, whole = first["against"]
    compared = whole["comparison"]
    assert (code, compared["program"], compared["only_there"]) == (0, "train.py, 2 ranks", [])
    assert compared["equal"] == compared["calls"] > 100
    assert not compared["not_compared"]
    assert whole["curve"]["loss"] == whole["curve"]["reference"]
    assert len(whole["curve"]["controls"]) == 4
    assert whole["curve"]["bound"][-1] > 0
