"""Each benign change changes something, and is as right as the reference by the error against
float64."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from small_runs import differs, outcomes, reference, step_calls

from glm_core.align.capture import Call
from glm_core.align.replay import Results, exact
from glm_core.faults.catalogue import BENIGN
from glm_core.faults.fault import Benign
from glm_core.sensitivity import setups


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Which sums a BLAS cuts differently depends on the number of threads; the sensitivity figure
    is taken with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CASES = [(b, dtype) for b in BENIGN if b.kernels for dtype in b.dtypes]
IDS = [f"{b.name}-{dtype}" for b, dtype in CASES]


@pytest.mark.parametrize(("change", "dtype"), CASES, ids=IDS)
def test_a_benign_change_changes_a_bit(change: Benign, dtype: str) -> None:
    changed = differs(change.backend(), step_calls(setups.setup_of(change), dtype))
    if change.by_library and not changed:
        pytest.skip("this CPU's matrix library sums in the same order")
    if change.neutral and not changed:
        pytest.skip("in a model this small it may change no bit")
    assert changed


def errors(found: Results, truth: Results) -> dict[str, float]:
    """Root mean square error of each result; parameters stand for their change."""
    names = [n for n in truth if n != "change"]
    return {n: float((found[n].double() - truth[n].double()).square().mean().sqrt()) for n in names}


def allowed(call: Call, truth: Results) -> dict[str, float]:
    """Four times the reference's error, and an ulp of the result's root mean square: of the
    result's own dtype, or the lower one in which the loss has its logits."""
    own = errors(reference(call), truth)
    logits = torch.finfo(call.args["x"].dtype).eps if call.op.name == "linear_cross_entropy" else 0
    size = {n: float(truth[n].double().square().mean().sqrt()) for n in own}
    return {n: 4 * own[n] + max(torch.finfo(truth[n].dtype).eps, logits) * size[n] for n in own}


@functools.cache
def judged(setup: str, dtype: str, op: str) -> list[tuple[Call, Results, dict[str, float]]]:
    """Returns the op's first calls of a setup's second step, with their exact results and the error
    that each may have."""
    calls = [c for c in step_calls(setup, dtype) if c.op.name == op and c.step == 2][:6]
    truths = [exact(c, reference(c)) for c in calls]
    return [(c, truth, allowed(c, truth)) for c, truth in zip(calls, truths, strict=True)]


@pytest.mark.parametrize(("change", "dtype"), CASES, ids=IDS)
def test_a_benign_change_is_as_right_as_the_reference(change: Benign, dtype: str) -> None:
    backend = change.backend()
    setup = setups.setup_of(change)
    known = [k for op in backend.kernels for k in judged(setup, dtype, op)]
    assert known
    for call, truth, limit in known:
        [found] = outcomes(backend, [call])
        assert {n: y.dtype for n, y in found.items()} == {n: y.dtype for n, y in truth.items()}
        for name, error in errors(found, truth).items():
            assert error <= limit[name], f"{call.op.name} {name}"


def test_the_catalogue_is_large_and_names_are_unique() -> None:
    assert len({b.name for b in BENIGN}) == len(BENIGN)
    for dtype in setups.DTYPES:
        counted = [b for b in BENIGN if dtype in b.dtypes and not b.neutral and not b.registered]
        assert len(counted) >= 42
        assert {b.setup or setups.setup_of(b) for b in counted} == set(setups.SETUPS)
