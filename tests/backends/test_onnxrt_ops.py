"""Tests the onnxrt backend on ONNX Runtime's own CPU provider: our ops, and third parties' ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from glm_core import ops
from glm_core.backends import registry
from glm_core.backends.onnxrt import engine, nbits
from glm_core.backends.onnxrt.call import Call, by_nbits, flatten
from glm_core.dispatch import REGISTRY, Op, op
from glm_core.errors import GlmCoreError, UnsupportedOpError
from glm_core.ops.quant import quantize
from glm_core.spec import Cost

pytest.importorskip("onnxruntime", reason="pip install 'glm-core[onnx]'")
pytest.importorskip("onnx", reason="pip install 'glm-core[onnx]'")
from onnxrt_judge import cases, complaint

BACKEND = registry.get("onnxrt")
CASES = {c.id: c for c in cases(BACKEND, torch.float32)}  # run by test_conformance.py


def test_conformance_rejects_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    run = engine.Program.run
    monkeypatch.setattr(engine.Program, "run", lambda *a: [x * (1 + 1e-5) for x in run(*a)])
    assert "times what the reference" in complaint(CASES["rms_norm-float32-2x5x96-test"], BACKEND)


def test_every_op_has_a_kernel() -> None:
    assert set(registry.get("onnxrt").kernels) == set(ops.all_ops())


@pytest.fixture
def declare() -> Iterator[Callable[..., Op]]:
    """Declares ops of a third party for the duration of a test."""
    before = dict(REGISTRY)

    def make(reference: Callable[..., Any], **roles: tuple[str, ...]) -> Op:
        return op(samples=lambda: [], cost=lambda **_: Cost(0, 0), **roles)(reference)

    yield make
    REGISTRY.clear()
    REGISTRY.update(before)


def test_third_party_op_runs_in_both_directions(declare: Callable[..., Op]) -> None:
    def scaled_softplus(x: Tensor, table: Tensor, ids: Tensor, mode: str, power: int = 2) -> Any:
        """Has two results, one of integers, and string and integer constants."""
        picked = table[ids] if mode == "pick" else table[:1]
        y = torch.nn.functional.softplus(x) * picked**power
        return y.cumsum(-1) if mode == "sum" else torch.roll(y, 1, -1), ids + 1

    made = declare(scaled_softplus, differentiable=("x", "table"))
    x, table = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    ids = torch.tensor([4, 0, 4])
    with registry.use("onnxrt", strict=True):
        y, successor = made(x, table, ids, "pick")
        got = torch.autograd.grad(y.square().sum(), (x, table))
    y_ref, successor_ref = made.reference(x, table, ids, "pick")
    want = torch.autograd.grad(y_ref.square().sum(), (x, table))
    torch.testing.assert_close(y, y_ref)
    assert torch.equal(successor, successor_ref)
    torch.testing.assert_close(got, want)


def test_what_cannot_be_translated_falls_back_with_its_reason(declare: Callable[..., Op]) -> None:
    def median(x: Tensor) -> Tensor:
        """Returns the median."""
        return x.median(-1).values

    made = declare(median)
    x = torch.randn(2, 5)
    with registry.use("onnxrt") as session:
        assert torch.equal(made(x), x.median(-1).values)
    (reason,) = [f.reason for f in session.fallbacks]
    assert "aten.median.dim has no ONNX translation" in reason
    with (
        registry.use("onnxrt", strict=True),
        pytest.raises(UnsupportedOpError, match=r"median\.dim"),
    ):
        made(x)


def test_argument_of_unknown_type_is_refused_with_its_reason(declare: Callable[..., Op]) -> None:
    def cast(x: Tensor, to: torch.dtype) -> Tensor:
        """Returns x in another dtype."""
        return x.to(to)

    made = declare(cast)
    with registry.use("onnxrt", strict=True), pytest.raises(UnsupportedOpError, match="type dtype"):
        made(torch.ones(2), torch.float64)


def test_numbers_of_an_in_place_op_are_inputs() -> None:
    a = next(s for s in ops.adamw.samples() if s.id == "mixed").make(torch.float32)
    b = {k: [t.clone() for t in v] if isinstance(v, list) else v for k, v in a.items()}
    with registry.use("onnxrt", strict=True):
        ops.adamw(**a)
        before = engine._attempt.cache_info().misses
        for step in (4, 5, 6):
            ops.adamw(**{**a, "step": step, "lr": 1e-3 / step, "beta1": 0.8})
    assert engine._attempt.cache_info().misses == before
    ops.adamw.reference(**b)
    for step in (4, 5, 6):
        ops.adamw.reference(**{**b, "step": step, "lr": 1e-3 / step, "beta1": 0.8})
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        torch.testing.assert_close(a[name], b[name])


def test_in_place_op_that_branches_on_a_number(declare: Callable[..., Op]) -> None:
    def decay(x: Tensor, rate: float) -> None:
        """Sets x to x (1 - rate), and halves it where the rate is large."""
        x.mul_(0.5 if rate > 0.5 else 1 - rate)

    made = declare(decay, mutates=("x",))
    x = torch.ones(3)
    with registry.use("onnxrt", strict=True):
        for rate in (0.25, 0.75, 0.5):
            made(x, rate)
    assert torch.equal(x, torch.full((3,), 0.75 * 0.5 * 0.5))


def test_index_out_of_range_is_one_line() -> None:
    with registry.use("onnxrt", strict=True), pytest.raises(GlmCoreError) as caught:
        ops.embedding(torch.tensor([0, -1]), torch.randn(4, 2))
    assert "\n" not in str(caught.value)


def test_summing_many_rows_is_deterministic_with_two_threads() -> None:
    ids, table = torch.zeros(20000, dtype=torch.int64), torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(20000, 8)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with registry.use("onnxrt", strict=True):
            grads = [
                torch.autograd.grad((ops.embedding(ids, table) * weight).sum(), table)[0]
                for _ in range(6)
            ]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(g, grads[0]) for g in grads)


def test_second_derivative_is_refused() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    with registry.use("onnxrt", strict=True):
        (gradient,) = torch.autograd.grad(ops.gelu(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="does not require grad"):
            gradient.sum().backward()


def test_quantised_products_are_matmulnbits_on_its_cpu_provider() -> None:
    x, w = torch.randn(2, 64), torch.randn(3, 64)
    codes, scale = quantize(w, 4, 32)
    layout, tensors, numbers = flatten([x, codes, scale, None, 4, 8])
    specs = tuple((t.dtype, t.shape) for t in tensors)
    call = Call(ops.quantized_linear, "forward", layout, tuple(numbers), specs)
    assert by_nbits(call, engine.CPU)
    assert b"MatMulNBits" in nbits.export(call)
    for other in (call._replace(direction="vjp"), call._replace(numbers=None)):
        assert not by_nbits(other, engine.CPU)
    assert not by_nbits(call, "OpenVINOExecutionProvider")
