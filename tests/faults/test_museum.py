"""Every exhibit of the museum has a public report, a mistake that can be planted, and a place that
a verdict can name."""

from __future__ import annotations

import re

import pytest

from glm_core.distributed.plan import parse
from glm_core.faults.museum.bugs import BUGS
from glm_core.faults.museum.exhibit import Exhibit
from glm_core.faults.museum.hall import HALL, ONE_PROCESS
from glm_core.faults.museum.own_kernels import OWN, fault_named
from glm_core.faults.museum.plans import MANY
from glm_core.ops import all_ops
from glm_core.training.optimizer import Optimizer
from glm_core.training.parallel import SingleProcess
from glm_core.training.trainer import Trainer

PLACES = ("every gradient", "gradient *", "gradient of *", "gradient norm", "loss", "update")
STATE = ("sampler", "exp_avg*", "optimizer_steps", "rng.torch")


def test_the_hall_is_large_and_its_names_are_unique() -> None:
    assert len(ONE_PROCESS) >= 50
    assert len(MANY) >= 15
    assert len({e.name for e in HALL}) == len(HALL)
    assert {e.part for e in HALL} == {"kernel", "training", "resume", "plan"}
    share = sum(e.held_out for e in HALL) / len(HALL)
    assert 0.15 < share < 0.4


@pytest.mark.parametrize("e", HALL, ids=lambda e: e.name)
def test_an_exhibit_has_a_report_and_a_mistake(e: Exhibit) -> None:
    assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+", e.report)
    assert e.did[0].islower() or e.did.startswith(("Adam", "GLM", "AdamW", "FSDP", "TF32"))
    if e.part == "kernel":
        fault = fault_named(e.fault)
        assert set(fault.kernels()) <= set(all_ops())
        assert e.where.split()[0] in fault.kernels()
    elif e.part == "plan":
        assert e.plant is BUGS[e.fault]
        assert parse(e.plan).world == 2
        assert e.where in PLACES or e.where in ("*weight*", "gradient of embedding")
    else:
        assert e.where in (*PLACES, *STATE, "gradient of embedding")


@pytest.mark.parametrize("e", [e for e in ONE_PROCESS if e.plant], ids=lambda e: e.name)
def test_a_planted_mistake_is_taken_out_again(e: Exhibit) -> None:
    def functions() -> list[object]:
        owners = (Trainer, Optimizer, SingleProcess)
        return [f for owner in owners for f in vars(owner).values()]

    before = functions()
    assert e.plant is not None
    with e.plant():
        pass
    assert functions() == before


def test_every_own_kernel_is_exhibited() -> None:
    assert {f.id for f in OWN} <= {e.fault for e in HALL}
