"""Tests the compiled kernels: every conformance case with every instruction set, results that do
not depend on the number of threads, and operators that torch can trace."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from glm_core import ops
from glm_core.backends import cpu
from glm_core.backends.cpu import extension, fakes
from glm_core.backends.registry import probe, use
from glm_core.conformance.case import Case, every_case
from glm_core.conformance.check import judge
from glm_core.conformance.oracle import compute
from glm_core.ops.quant import quantize

pytestmark = pytest.mark.skipif(not probe("cpu").ok, reason=probe("cpu").reason)

CASES = [
    c
    for c in every_case(cpu.backend)
    if c.mode in ("test", "grad") and c.op.name in cpu.backend.kernels
]
# their order of summation is torch's business
TORCH_PRODUCTS = {
    *itertools.product(
        ("linear", "linear_cross_entropy", "route", "grouped_linear"), ("test", "grad")
    ),
    *itertools.product(("quantized_linear", "quantized_grouped_linear"), ("grad",)),
}
ISAS = cpu.isas() if probe("cpu").ok else []


@pytest.fixture
def any_isa() -> Iterator[Callable[[str], None]]:
    """Selects an instruction set for one test."""
    before = cpu.isa()
    yield cpu.select_isa
    cpu.select_isa(before)


ELEMENTWISE = {"adamw", "embedding"}
"""a published model's millions of elements run the same code as the small samples"""


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in CASES
        if not c.sample.large
        and not (
            c.sample.real and ((c.op.name, c.mode) in TORCH_PRODUCTS or c.op.name in ELEMENTWISE)
        )
    ],
    ids=lambda c: c.id,
)
def test_every_other_instruction_set_conforms(case: Case, any_isa: Callable[[str], None]) -> None:
    wrong = {}  # the best one is test_conformance.py's
    for isa in ISAS[:-1]:
        any_isa(isa)
        if reason := judge(case, cpu.backend).reason:
            wrong[isa] = reason
    assert not wrong


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in CASES
        if (c.op.name, c.mode) not in TORCH_PRODUCTS
        and not c.raises
        and not (c.sample.large and c.op.name == "quantized_linear")  # many rows: torch's product
    ],
    ids=lambda c: c.id,
)
def test_results_do_not_depend_on_threads(case: Case, threads: Callable[[int], None]) -> None:
    seen = []
    for n in (1, 2):
        threads(n)
        with use("cpu", strict=True):
            seen.append(compute(case, case.op, case.sample.make(case.dtype)))
    for name in seen[0]:
        assert torch.equal(seen[0][name], seen[1][name]), name


def test_extension_older_than_its_sources_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_there() -> None:
        """Stands for an operator of newer sources."""

    monkeypatch.setattr(fakes, "FAKES", [not_there])
    assert "older than its sources (no not_there)" in extension._load()


def test_loops_run_on_as_many_threads_as_torch_has(threads: Callable[[int], None]) -> None:
    for n in (1, 2):
        threads(n)
        assert torch.ops.glm_core.threads_used(64) == n


def operator_calls() -> dict[str, tuple[Any, ...]]:
    """Returns a call of every public operator, with gradients where it has any."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(shape, generator=g).requires_grad_(grad)

    angles = [draw(2, 5, 1, 4, grad=False) for _ in range(2)]
    ids, labels = torch.tensor([[3, 3], [0, 6]]), torch.tensor([1, 4, 0])
    start, end = torch.zeros(2, 5, dtype=torch.int32), torch.arange(1, 6).int().expand(2, 5)
    lists = [[draw(3, 5, grad=False), draw(7, grad=False)] for _ in range(4)]
    moments = [lists[2], [t.square() for t in lists[3]]]
    codes = torch.ones(3, 32, dtype=torch.int8)
    scales, split = torch.ones(2, 3).half(), torch.tensor([1, 2])
    hyper = (3, 1e-3, 0.9, 0.95, 1e-8, 0.1)
    return {
        "rms_norm": (draw(2, 5, 33), draw(33), 1e-5),
        "layer_norm": (draw(2, 5, 33), draw(33), draw(33), 1e-5),
        "add_rms_norm": (draw(2, 5, 33), draw(2, 5, 33), draw(33), 1e-5, 1.0),
        "add_layer_norm": (draw(2, 5, 33), draw(2, 5, 33), draw(33), draw(33), 1e-5, 2.8),
        "gelu": (draw(3, 17),),
        "geglu": (draw(3, 34),),
        "swiglu": (draw(3, 34),),
        "rope": (draw(2, 5, 3, 11), *angles, True),
        "embedding": (ids, draw(7, 33), 0.1),
        "attention": (draw(2, 5, 4, 8), draw(2, 5, 2, 8), draw(2, 5, 2, 8), start, end, 0.35),
        "linear_cross_entropy": (draw(3, 8), draw(5, 8), labels, torch.tensor([1.0, 0.0, 2.0])),
        "linear_few": (draw(2, 33, grad=False), draw(5, 33, grad=False), None),
        "quantized_linear": (draw(2, 5, 64), codes, torch.ones(3).half(), None, 4, 16),
        "route": (draw(3, 8), draw(6, 8), draw(6, grad=False), 2, 3, 2, 1.8, True),
        "permute": (draw(4, 9), torch.tensor([[2, 0], [1, 0], [2, 2], [0, 1]]), 3),
        "unpermute": (draw(4, 9), torch.tensor([2, 0, 3, 1]), draw(2, 2)),
        "grouped_linear": (draw(5, 9), draw(3, 4, 9), torch.tensor([2, 0, 3])),
        "quantized_grouped_linear": (draw(3, 64), codes.expand(2, 3, 32), scales, split, 4, 16),
        "global_norm": (lists[0],),
        "adamw_": (lists[0], lists[1], *moments, torch.tensor(0.5), *hyper, []),
    }


UNTRACED = ("test_schema", "test_autograd_registration", "test_faketensor")
TRACED = (*UNTRACED, "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
"""the checks of opcheck; those by AOT tracing add up the outputs in place, which fails where the
first output is an integer (torch 2.13)"""


# since torch 2.14 the check's own AOT tracing reads .grad of the clones that it made
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", operator_calls())
def test_torch_accepts_the_operator(name: str) -> None:
    """Checks schema, fake kernel, autograd registration and AOT tracing with changing shapes."""
    checks = UNTRACED if name == "route" else TRACED
    operator = getattr(torch.ops.glm_core, name).default
    torch.library.opcheck(operator, operator_calls()[name], test_utils=checks)


def block(x: Tensor, norm: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Computes a feed-forward block and a loss over it."""
    hidden, total = ops.add_rms_norm(ops.rms_norm(x, norm), x, norm)
    y = total + ops.linear(ops.swiglu(ops.linear(hidden, up)), down)
    labels = torch.arange(len(x)) % len(up)
    return ops.linear_cross_entropy(y, up, labels, torch.ones(len(x)))


def test_a_composition_compiles_whole_and_agrees() -> None:
    g = torch.Generator().manual_seed(0)
    shapes = ((6, 16), (16,), (24, 16), (16, 12))
    eager, compiled = (
        [torch.randn(s, generator=g.manual_seed(0)).requires_grad_() for s in shapes]
        for _ in range(2)
    )
    with use("cpu", strict=True):
        block(*eager).backward()
        torch.compile(block, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for e, c in zip(eager, compiled, strict=True):
        torch.testing.assert_close(c.grad, e.grad)


def test_a_second_backward_over_one_graph_gives_the_same_gradients() -> None:
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=g).requires_grad_() for s in ((4, 8), (5, 8)))
    loss = torch.ops.glm_core.linear_cross_entropy(x, w, torch.arange(4), torch.ones(4))
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(loss * 3, (x, w))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "4-16", "4-8", "8-16", "8-8"])
def test_a_row_does_not_depend_on_the_rows_beside_it(
    kind: str, dtype: torch.dtype, any_isa: Callable[[str], None]
) -> None:
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=g).to(dtype) for s in ((8, 416), (21, 416)))
    for isa in ISAS:
        any_isa(isa)
        if kind == "linear":
            run = lambda x: ops.linear(x, w)  # noqa: E731
        else:
            bits, activation_bits = map(int, kind.split("-"))
            codes = quantize(w, bits, 32)
            run = lambda x: ops.quantized_linear(x, *codes, None, bits, activation_bits)  # noqa: B023,E731
        with use("cpu", strict=True), torch.no_grad():
            together = run(x)
            for rows in (1, 2, 3, 5):
                assert torch.equal(run(x[:rows]), together[:rows])


def test_many_rows_agree_with_few() -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 256, generator=g), torch.randn(1000, 256, generator=g)
    for bits, group in ((4, 32), (8, 0)):
        codes, scale = quantize(w, bits, group)
        for activation_bits in (8, 16):
            args = (codes, scale, None, bits, activation_bits)
            with use("cpu", strict=True):
                torch.testing.assert_close(
                    ops.quantized_linear(x, *args)[:4],
                    ops.quantized_linear(x[:4], *args),
                    rtol=0,
                    atol=1e-4,
                )


@pytest.mark.parametrize(
    ("width", "rows", "words"), [(63, 3, "x has width 63"), (64, 2, "scale must have 3 rows")]
)
def test_quantised_shapes_that_do_not_fit_are_refused(width: int, rows: int, words: str) -> None:
    weight, scale = torch.ones(3, 32).char(), torch.ones(rows).half()
    with pytest.raises(ValueError, match=words):
        torch.ops.glm_core.quantized_linear(torch.ones(1, width), weight, scale, None, 4, 16)


def test_scales_that_are_not_float16_are_refused() -> None:
    weight, scale = torch.ones(3, 32).char(), torch.ones(3)
    with pytest.raises(ValueError, match="scale must be float16, received Float"):
        torch.ops.glm_core.quantized_linear_backward(torch.ones(1, 3), weight, scale, 4)


def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"instruction set 'avx1024': this CPU has scalar"):
        cpu.select_isa("avx1024")


@pytest.mark.parametrize(("name", "usable"), [("scalar", True), ("sse9", False)])
def test_the_environment_selects_the_instruction_set(name: str, usable: bool) -> None:
    code = "from glm_core.backends import cpu; print(cpu.backend.probe(), cpu.isa())"
    seen = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"GLM_CORE_ISA": name},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert ("Probe(ok=True, reason='') scalar" in seen) == usable
    assert ("GLM_CORE_ISA: instruction set 'sse9'" in seen) != usable


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_refused_with_the_reason(dtype: torch.dtype) -> None:
    x = torch.ones(2, 4, dtype=dtype)
    answer = cpu.backend.support(ops.rms_norm, {"x": x, "weight": x[0]})
    assert answer == (False, f"kernels take float32 and bfloat16, received {dtype}")


def test_the_loss_never_holds_all_logits() -> None:
    n, d, v = 2048, 8, 16384
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=g).requires_grad_() for s in ((n, d), (v, d)))
    args = (x, w, torch.randint(v, (n,), generator=g), torch.ones(n))
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        torch.ops.glm_core.linear_cross_entropy(*args).backward()
    largest = max(e.self_cpu_memory_usage for e in profile.events())
    assert 0 < largest < n * v * 4 // 4
