"""Each planted fault changes something in the model it is planted in, and nothing else does."""

from __future__ import annotations

import functools

import pytest
import torch
from small_runs import differs, outcomes, step_calls, two_steps

from glm_core import ops
from glm_core.align.replay import replay
from glm_core.faults import activation, flash, kernels, loss, norm, optim
from glm_core.faults.catalogue import PLANTED
from glm_core.faults.fault import BOTH, Fault
from glm_core.sensitivity import setups

CASES = [(fault, dtype) for fault in PLANTED for dtype in fault.dtypes if fault.kernels()]
IN_STEP = [fault for fault in PLANTED if not fault.kernels()]


@pytest.mark.parametrize(("fault", "dtype"), CASES, ids=[f"{f.name}-{d}" for f, d in CASES])
def test_a_fault_changes_a_bit(fault: Fault, dtype: str) -> None:
    assert differs(fault.backend(), step_calls(setups.setup_of(fault), dtype))


@pytest.mark.parametrize("fault", IN_STEP, ids=lambda f: f.name)
def test_a_fault_outside_the_ops_changes_weights(fault: Fault) -> None:
    right = weights(setups.setup_of(fault))
    with fault.plant():
        wrong = two_steps(setups.setup_of(fault)).optimizer.master
    assert any(not torch.equal(w, wrong[n]) for n, w in right.items())


@functools.cache
def weights(setup: str) -> dict[str, torch.Tensor]:
    """Returns a setup's weights after two steps without a fault."""
    return two_steps(setup).optimizer.master


@pytest.mark.parametrize("fault", [f for f in PLANTED if f.kind == "stale"], ids=lambda f: f.name)
def test_a_fresh_backend_remembers_nothing(fault: Fault) -> None:
    calls = step_calls(setups.setup_of(fault), fault.dtypes[-1])
    first, second = (outcomes(fault.backend(), calls) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)


# they have a frozen weight: no step that trains a whole model calls them
UNCALLED = ("quantized_linear", "quantized_grouped_linear")
TRAINED = [n for n in ops.all_ops() if n in ops.__all__ and n not in UNCALLED]


def test_every_kind_and_op_occurs() -> None:
    assert {f.kind for f in PLANTED} == {
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
    planted = {op for f in PLANTED for op in f.kernels()}
    assert planted == set(TRAINED)
    assert {f.direction for f in PLANTED} == {"forward", "backward", "both", "update"}


def test_names_are_unique_and_exceptions_have_reasons() -> None:
    assert len({f.name for f in PLANTED}) == len(PLANTED)
    for dtype in setups.DTYPES:
        assert sum(dtype in f.dtypes for f in PLANTED) >= 40
    assert all(f.reason for f in PLANTED if f.dtypes != BOTH)


RIGHT = {
    "adamw": optim.adam(),
    "geglu": activation.gated(torch.nn.functional.gelu, 1),
    "swiglu": activation.gated(torch.nn.functional.silu, 0),
    "add_layer_norm": norm.added(ops.layer_norm.reference),
    "add_rms_norm": norm.added(ops.rms_norm.reference),
    "linear_cross_entropy": loss.cross_entropy(),
}


@pytest.mark.parametrize("dtype", setups.DTYPES)
@pytest.mark.parametrize("op", TRAINED)
def test_without_a_fault_the_machinery_keeps_every_bit(op: str, dtype: str) -> None:
    reference = ops.all_ops()[op]
    right = [RIGHT.get(op, kernels.changed(reference))]
    if reference.differentiable:
        vjp = kernels.vjp(reference, reference.reference)
        right += [
            kernels.splice(reference, reference.reference, vjp),
            kernels.edited(reference, lambda a, grads: {}),
        ]
    calls = [c for s in setups.SETUPS for c in step_calls(s, dtype) if c.op.name == op]
    assert calls
    for kernel in right:
        assert not differs(kernels.backend("right", {op: kernel}), calls)


def test_the_backward_in_closed_form_is_right_without_its_fault() -> None:
    backend = kernels.backend("right", {"attention": flash.flash_attention(16, rounding=True)})
    for call in step_calls("glm4", "float32"):
        if call.op is ops.attention:
            (mine,), right = outcomes(backend, [call]), replay(call, ops.attention.reference)
            for name in right:
                largest = float(right[name].abs().max())
                torch.testing.assert_close(mine[name], right[name], rtol=0, atol=1e-4 * largest)
