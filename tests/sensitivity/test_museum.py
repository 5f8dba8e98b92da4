"""Exhibits are found, named and counted; one that no test asks for is missed with its reason."""

from __future__ import annotations

import dataclasses

import pytest

from glm_core import ops
from glm_core.errors import ConfigError
from glm_core.faults.fault import Fault
from glm_core.faults.kernels import changed
from glm_core.faults.museum.hall import HALL
from glm_core.faults.museum.own_kernels import fault_named, offset_wraps
from glm_core.sensitivity import museum
from glm_core.sensitivity.judges import ACQUITTED, Verdict, by_conformance, by_resuming, small_run

EXHIBITS = {e.name: e for e in HALL}
BLANK = museum.Row(
    name="", kind="kernel", expected="rope forward", by="conformance", where="", why="", seconds=0.0
)


def row(name: str, where: str = "rope forward", **fields: str) -> museum.Row:
    return dataclasses.replace(BLANK, name=name, where=where, **fields)  # type: ignore[arg-type]  # made by hand


@pytest.mark.parametrize("name", ["inner-tail-lost", "rms-eps-hard-coded"])
def test_a_wrong_kernel_is_found_and_named(name: str) -> None:
    e = EXHIBITS[name]
    found = by_conformance(fault_named(e.fault).backend(), "float32")
    assert (found.by, found.where) == ("conformance", e.where)


def test_cases_that_exist_in_one_dtype_are_asked_whatever_the_working_dtype() -> None:
    wrapping = changed(ops.gelu, x=lambda a: offset_wraps(a["x"]))
    backend = Fault("gelu", "offsets wrap", lambda: {"gelu": wrapping}).backend()
    assert by_conformance(backend, "float32", real=False) == ACQUITTED
    found = by_conformance(backend, "float32")
    assert found.where == "gelu forward"
    assert found.why.startswith("gelu-bfloat16-2x5x48-x-far-test: ")


def test_a_forgotten_step_count_is_found_on_resume_and_an_honest_resume_is_not() -> None:
    run = museum.resumed(small_run("float32", 4))
    exhibit = EXHIBITS["step-count-lost-on-resume"]
    assert exhibit.plant is not None
    assert by_resuming(run, exhibit.plant)[:2] == ("resume", "optimizer_steps")
    assert by_resuming(run) == ACQUITTED


def test_what_is_counted() -> None:
    found = [
        row("right"),
        row("elsewhere", "rope backward"),
        row("unseen", "", by="", why="nobody asks"),
        row("honest", kind="benign", by="", expected=""),
        row("accused", kind="benign", expected="", why="too far"),
    ]
    result = museum.Museum(rows=found, seconds=1.0, held_out=False)
    j = result.to_json()
    assert (j["exhibits"], j["found"], j["named"]) == (3, 2, 1)
    assert j["missed"] == {
        "elsewhere": "rope backward was named, not rope forward",
        "unseen": "nobody asks",
    }
    assert j["false_alarms"] == {"accused": "too far"}
    assert not result.reached
    assert "unseen: nobody asks" in result.text()
    assert museum.Museum(rows=found[:1], seconds=1.0, held_out=True).reached


def test_an_unknown_exhibit() -> None:
    with pytest.raises(ConfigError, match="unknown exhibit 'tf32'; known: "):
        museum.museum(only=["tf32"])


def test_a_verdict_names_nothing_where_nothing_is_wrong() -> None:
    assert Verdict() == ACQUITTED
