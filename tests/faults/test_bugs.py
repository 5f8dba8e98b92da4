"""The planted bugs: each does something in the model it is planted in, and nothing else does."""

from __future__ import annotations

import pytest
import torch
from small_runs import differs, outcomes, step_calls

from glm_core import ops
from glm_core.align.replay import replay
from glm_core.faults import variants, wrong, wrong_attention, wrong_norm, wrong_training
from glm_core.faults.bugs import BUGS
from glm_core.faults.variants import Bug
from glm_core.sensitivity import catalogue

CASES = [(bug, dtype) for bug in BUGS for dtype in bug.dtypes]


@pytest.mark.parametrize(("bug", "dtype"), CASES, ids=[f"{b.name}-{d}" for b, d in CASES])
def test_a_bug_changes_a_bit(bug: Bug, dtype: str) -> None:
    assert differs(bug.backend(), step_calls(catalogue.setup_of(bug), dtype))


@pytest.mark.parametrize("bug", [b for b in BUGS if b.kind == "stale"], ids=lambda b: b.name)
def test_a_fresh_backend_remembers_nothing(bug: Bug) -> None:
    calls = step_calls(catalogue.setup_of(bug), bug.dtypes[-1])
    first, second = (outcomes(bug.backend(), calls) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)


# quantized_linear has a frozen weight: no step that trains a whole model calls it
TRAINED = [n for n in ops.all_ops() if n in ops.__all__ and n != "quantized_linear"]


def test_every_kind_and_op_occurs() -> None:
    assert {b.kind for b in BUGS} == {
        "formula",
        "gradient",
        "optimizer",
        "mask",
        "position",
        "dtype",
        "eps",
        "scale",
        "rounding",
        "rows",
        "stale",
        "rare shape",
    }
    planted = {op for b in BUGS for op in b.kernels()}
    assert planted == set(TRAINED)
    assert {b.direction for b in BUGS} == {"forward", "backward", "both", "update"}


def test_names_are_unique_and_exceptions_have_reasons() -> None:
    assert len({b.name for b in BUGS}) == len(BUGS)
    for dtype in catalogue.DTYPES:
        assert sum(dtype in b.dtypes for b in BUGS) >= 40
    assert all(b.reason for b in BUGS if b.dtypes != variants.BOTH)


RIGHT = {
    "adamw": wrong_training.adam(),
    "geglu": wrong.gated(torch.nn.functional.gelu, 1),
    "swiglu": wrong.gated(torch.nn.functional.silu, 0),
    "add_layer_norm": wrong_norm.added(ops.layer_norm.reference),
    "add_rms_norm": wrong_norm.added(ops.rms_norm.reference),
    "linear_cross_entropy": wrong_training.cross_entropy(),
}


@pytest.mark.parametrize("dtype", catalogue.DTYPES)
@pytest.mark.parametrize("op", TRAINED)
def test_without_a_bug_the_machinery_keeps_every_bit(op: str, dtype: str) -> None:
    reference = ops.all_ops()[op]
    kernels = [RIGHT.get(op, variants.changed(reference))]
    if reference.differentiable:
        vjp = variants.vjp(reference, reference.reference)
        kernels += [
            variants.splice(reference, reference.reference, vjp),
            variants.edited(reference, lambda a, found: {}),
        ]
    calls = [c for s in catalogue.SETUPS for c in step_calls(s, dtype) if c.op.name == op]
    assert calls
    for kernel in kernels:
        assert not differs(variants.backend("right", {op: kernel}), calls)


def test_the_backward_in_closed_form_is_right_without_its_bug() -> None:
    whole = wrong_attention.flash_backward(lambda do, o: (do * o).sum(-1, keepdim=True))
    kernel = variants.splice(ops.attention, ops.attention.reference, whole)
    backend = variants.backend("right", {"attention": kernel})
    for call in step_calls("glm4", "float32"):
        if call.op is ops.attention:
            (mine,), right = outcomes(backend, [call]), replay(call, ops.attention.reference)
            for name in right:
                torch.testing.assert_close(mine[name], right[name], rtol=1e-5, atol=1e-9)
