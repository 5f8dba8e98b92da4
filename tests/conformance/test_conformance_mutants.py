"""The samples kill every wrong kernel of the catalogue."""

from __future__ import annotations

import json

import pytest

from glm_core import ops
from glm_core.backends.registry import get
from glm_core.conformance.case import MODES, Case, select
from glm_core.conformance.mutants import mutants
from glm_core.faults.catalogue import FAULTS, every_mutant


def test_every_op_has_its_own_mutants_and_backward_only_ones() -> None:
    for op in ops.all_ops().values():
        assert sum(bool(f.mutant) and f.op == op.name for f in FAULTS) >= 3
        own = [m for m in every_mutant() if m.op == op.name]
        assert len({m.id for m in own}) == len(own)
        assert not op.differentiable or any("gradient" in m.mutant for m in own)


@pytest.mark.parametrize("op", ops.all_ops())
def test_the_samples_kill_every_mutant(op: str) -> None:
    report = mutants(op)
    assert not [m.id for m in report.survivors]
    data = json.loads(json.dumps(report.to_json()))
    assert data["mutants"] == data["killed"] == len(report.trials)
    # a mutant that only crashes shows nothing about the samples; one without any gradient may
    broken = [t.mutant.id for t in report.trials if "Error: " in t.reason]
    assert all(id.endswith("_missing") for id in broken)


def test_a_right_kernel_survives_and_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    from glm_core.conformance import mutants as module
    from glm_core.faults.fault import Fault

    right = Fault("swiglu", "nothing", lambda: {"swiglu": ops.swiglu.reference}, mutant="right")
    monkeypatch.setattr(module, "every_mutant", lambda: [right])
    found = module.mutants()
    assert not found.ok
    assert found.to_json()["survivors"] == [{"id": "swiglu/right", "wrong": "nothing"}]
    assert "survivor swiglu/right: nothing" in found.text()


def test_case_is_one_object_for_every_mode() -> None:
    fields = {f: [] for f in ("op", "sample", "dtype")}  # type: dict[str, list[Any]]
    for mode in MODES:
        [case] = select(get("reference"), id=f"gelu-float32-8x13696-{mode}")
        assert isinstance(case, Case)
        fields["op"].append(case.op)
        fields["dtype"].append(case.dtype)
        fields["sample"].append(case.sample.id)
    assert all(len(set(values)) == 1 for values in fields.values())
