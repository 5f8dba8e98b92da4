"""Each check of a case finds its fault, and a fault is a result, never a crash."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glm_core import ops
from glm_core.backends.base import Backend
from glm_core.backends.registry import use
from glm_core.conformance.case import CaseFailure
from glm_core.conformance.check import check_raises_alone
from glm_core.conformance.report import Report, Result
from glm_core.conformance.run import run
from glm_core.ops import layout
from glm_core.spec import SUPPORTED, Support, unsupported

ROOT = Path(__file__).parents[2]


def toy(**facts: Any) -> Backend:
    """A backend of this test with no kernels."""
    chosen = {"dtypes": (torch.float32,), **facts}
    return Backend(name="toy", device_type="cpu", verified="in this test", **chosen)


def only(report: Report) -> Result:
    [result] = report.results
    return result


def test_unsupported_carries_the_backends_own_reason() -> None:
    backend = toy()

    def supports(x: Tensor) -> Support:
        return SUPPORTED if x.is_contiguous() else unsupported("x has gaps")

    backend.implements(ops.gelu, supports)(ops.gelu.reference)
    report = run(backend, mode=("test", "support"), op="gelu", real=False)
    outcomes = {r.id: (r.outcome, r.reason) for r in report.results}
    assert outcomes["gelu-float32-3x33-gapped-test"] == ("unsupported", "x has gaps")
    assert outcomes["gelu-float32-3x33-gapped-support"] == ("unsupported", "x has gaps")
    assert outcomes["gelu-float32-2x5x48-test"][0] == "pass"
    without = run(backend, op="geglu", real=False)
    assert {(r.outcome, r.reason) for r in without.results} == {
        ("unsupported", "no kernel for this op")
    }


def test_an_index_of_32_bits_fails_past_them_and_a_lack_of_room_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = toy()

    @backend.implements(ops.gelu)
    def gelu(x: Tensor) -> Tensor:
        narrow = [stride & 0x7FFFFFFF for stride in x.stride()]
        return ops.gelu.reference(x.as_strided(x.shape, narrow))

    id = "gelu-float32-2x5x48-x-far-test"
    assert only(run(backend, id="gelu-float32-2x5x48-test")).outcome == "pass"
    assert only(run(backend, id=id)).outcome == "fail"
    monkeypatch.setattr(layout, "FAR", 2**60)
    found = only(run(backend, id=id))
    assert found.outcome == "unsupported"
    assert "do not fit on cpu" in found.reason


def test_a_kernel_that_raises_is_a_failure_not_a_crash() -> None:
    backend = toy()

    @backend.implements(ops.gelu)
    def gelu(x: Tensor) -> Tensor:
        raise RuntimeError("device lost\nand gone")

    result = only(run(backend, id="gelu-float32-1x1-test"))
    assert (result.outcome, result.reason) == ("fail", "RuntimeError: device lost and gone")
    assert result.rerun == "glm-core conformance --backend toy --id gelu-float32-1x1-test"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda y, x: y.double(), "out: dtype must be torch.float32; received torch.float64"),
        (lambda y, x: y[None], r"out: shape must be \(2, 5, 48\); received \(1, 2, 5, 48\)"),
        (lambda y, x: y.mT.contiguous().mT, "out: contiguous must be True; received False"),
        (lambda y, x: x.copy_(y), "argument x was changed"),
        (lambda y, x: x.view_as(x), "out shares memory with argument x"),
        (lambda y, x: y + torch.randn_like(y) * 1e-7, "out: a second run gives other bits"),
        (lambda y, x: y.nan_to_num(), "out: with nan in x, non-finite results are not where"),
    ],
)
def test_each_check_finds_its_fault(damage: Any, reason: str) -> None:
    backend = toy()

    @backend.implements(ops.gelu)
    def gelu(x: Tensor) -> Tensor:
        y: Tensor = damage(ops.gelu.reference(x), x)
        return y

    result = only(run(backend, id="gelu-float32-2x5x48-test"))
    assert result.outcome == "fail"
    assert re.match(reason, result.reason), result.reason


def test_determinism_is_held_only_where_it_is_claimed() -> None:
    backend = toy(deterministic=False)

    @backend.implements(ops.gelu)
    def gelu(x: Tensor) -> Tensor:
        return ops.gelu.reference(x) * (1 + torch.randint(-1, 2, x.shape) * 2**-24)

    assert only(run(backend, id="gelu-float32-2x5x48-test")).outcome == "pass"


class Queue(Backend):
    """Runs its kernel only at the next synchronize: a device whose queue is asynchronous."""

    def synchronize(self) -> None:
        while PENDING:
            PENDING.pop(0)()


PENDING: list[Any] = []


@pytest.mark.parametrize(("reads_early", "outcome"), [(True, "pass"), (False, "fail")])
def test_results_are_read_after_synchronize_and_inputs_in_order(
    reads_early: bool, outcome: str
) -> None:
    backend = Queue(
        name="queue", device_type="cpu", verified="in this test", dtypes=(torch.float32,)
    )

    @backend.implements(ops.gelu)
    def gelu(x: Tensor) -> Tensor:
        y, source = torch.full_like(x, 99.0), x.clone() if reads_early else x
        PENDING.append(lambda: y.copy_(ops.gelu.reference(source)))
        return y

    result = only(run(backend, id="gelu-float32-3x7x33-test"))
    assert result.outcome == outcome, result.reason
    if not reads_early:
        assert "a third run, its inputs overwritten behind it, gives other bits" in result.reason


def test_indexes_out_of_range_must_raise_and_the_first_error_is_told() -> None:
    backend = toy()

    @backend.implements(ops.embedding)
    def embedding(ids: Tensor, weight: Tensor, shrink: float = 1.0) -> Tensor:
        return ops.embedding.reference(ids.clamp(0, len(weight) - 1), weight, shrink)

    report = run(backend, id="embedding-float32-2x5-50x96-ids-*-test")
    assert [r.outcome for r in report.results] == ["fail", "fail"]
    assert all("an index out of range gave a result" in r.reason for r in report.results)
    fine = run("reference", id="embedding-*-ids-*-test")
    assert [r.outcome for r in fine.results] == ["pass", "pass"]


CRASHING = """
import os, signal
from glm_core import ops
from glm_core.backends.base import Backend
from glm_core.backends.registry import use
backend = Backend(name="crash", device_type="cpu", verified="in a test")
@backend.implements(ops.embedding)
def embedding(ids, weight, shrink=1.0):
    os.kill(os.getpid(), signal.SIGKILL)  # a crash that leaves no core file
"""


def test_a_crash_in_its_own_process_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "crash-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: crash\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[glm_core.backends]\ncrash = vendor_crash\n")
    (tmp_path / "vendor_crash.py").write_text(CRASHING)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    id = "embedding-float32-2x5-50x96-ids-past-end-test"
    check_raises_alone("reference", id.replace("float32", "float64"))
    with pytest.raises(CaseFailure, match=r"ends the process \(-9\)"):
        check_raises_alone("crash", id)


class Linear(torch.autograd.Function):
    """A right linear layer, but for what `wrong` changes in its forward or backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, wrong: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.bias, ctx.wrong = weight, bias is not None, wrong
        return ops.linear.reference(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), d = ctx.saved_tensors, dy.flatten(0, -2)
        dx, dw = dy @ weight, d.T @ x.flatten(0, -2)
        if ctx.wrong == "frozen" and not ctx.needs_input_grad[1]:  # PyTorch issue 183825
            dx[..., -1] = 0
        if ctx.wrong == "overwrites" and ctx.weight.grad is not None:  # TransformerEngine issue 545
            ctx.weight.grad.copy_(dw)
            dw = None
        return dx, dw, d.sum(0) if ctx.bias else None, None


FORWARD = ("recorded", "inference")


def linear_backend(wrong: str) -> Backend:
    backend = toy()

    @backend.implements(ops.linear)
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if wrong == "no bias" and not (x.requires_grad or weight.requires_grad):
            bias = None if bias is None else bias.detach()
        y: Tensor = Linear.apply(x, weight, bias, wrong)  # type: ignore[no-untyped-call]
        recorded = torch.is_grad_enabled() and y.requires_grad
        wrong_forward = recorded if wrong == "recorded" else torch.is_inference_mode_enabled()
        return y + 1e-3 * y.detach() if wrong in FORWARD and wrong_forward else y

    return backend


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("", ""),
        ("frozen", r"d x: with only x needing a gradient, 0 for"),
        ("overwrites", "d weight: it is not added to what .grad holds"),
        ("recorded", "out: while gradients are recorded, "),
        ("inference", "out: in inference mode, "),
        ("no bias", "with only bias needing a gradient, "),
    ],
)
def test_faults_that_only_training_or_a_frozen_argument_shows(wrong: str, reason: str) -> None:
    found = run(linear_backend(wrong), id="linear-float32-2x5x96-64-*")
    assert found.ok == (not wrong)
    assert all(re.search(reason, r.reason) for r in found.failed), found.failed


def test_a_gradient_may_be_refused_by_mask() -> None:
    backend = toy()

    def supports(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Support:
        return (
            unsupported("a frozen weight") if x.requires_grad > weight.requires_grad else SUPPORTED
        )

    backend.implements(ops.linear, supports)(ops.linear.reference)
    assert run(backend, id="linear-float32-2x5x96-64-grad").ok


def test_the_cpu_backend_trains_a_bias_alone() -> None:
    x, weight, bias = torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4, requires_grad=True)
    with use("cpu", strict=True):
        ops.linear(x, weight, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((4,), 2.0))  # type: ignore[arg-type]  # it is there
