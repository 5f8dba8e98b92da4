"""The verdict on programs of several ranks: what a collective delivers is judged by what the ranks
sent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ranks import Ranks

from glm_core.faults.collectives import COLLECTIVE_FAULTS
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
            assert sum("c10d" in row["operator"] for row in report["operators"]) == 15


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
