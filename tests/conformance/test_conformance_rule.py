"""The tolerance rule, and how cases are named, filtered and known to fail."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm_core import ops
from glm_core.backends.base import Backend
from glm_core.backends.registry import get
from glm_core.conformance.case import every_case, select
from glm_core.conformance.known_failures import load
from glm_core.conformance.oracle import Jitter
from glm_core.conformance.report import Report
from glm_core.conformance.run import run
from glm_core.conformance.tolerance import MAX_ERROR_RATIO, allowance, deviation
from glm_core.errors import ConfigError, GlmCoreError

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def toy(**facts: Any) -> Backend:
    """A backend of this test with no kernels."""
    chosen = {"dtypes": (torch.float32,), **facts}
    return Backend(name="toy", device_type="cpu", verified="in this test", **chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jitter_moves_what_is_between_by_one_unit(dtype: torch.dtype) -> None:
    x = torch.ones(100, dtype=dtype)
    with Jitter(seed=0):
        moved = x * 1
    units = (moved - 1) / torch.finfo(dtype).eps
    assert set(units.tolist()) <= {-1.0, 0.0, 1.0}
    assert units.abs().sum() > 30


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_rounding_is_forgiven_and_a_few_percent_are_not(dtype: torch.dtype) -> None:
    drawn = torch.Generator().manual_seed(0)
    exact = torch.randn(400, dtype=torch.float64, generator=drawn)
    rounded, eps = exact.to(dtype), torch.finfo(dtype).eps
    assert deviation(rounded, allowance(exact, [rounded])).ratio <= 1
    either = torch.where(torch.rand(400, generator=drawn) < 0.5, 1 - eps / 2, 1 + eps)
    assert (
        deviation((rounded * either).to(dtype), allowance(exact, [rounded])).ratio
        <= MAX_ERROR_RATIO
    )
    assert deviation(rounded * (1 + 8 * eps), allowance(exact, [rounded])).ratio > MAX_ERROR_RATIO


@pytest.mark.parametrize("dtype", FLOATS)
def test_rounding_that_always_goes_one_way_is_found(dtype: torch.dtype) -> None:
    exact = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rounded, eps = exact.to(dtype), torch.finfo(dtype).eps
    beyond = rounded.double().abs() > exact.abs()
    cut = torch.where(beyond, rounded.double() * (1 - eps / 2), rounded.double()).to(dtype)
    assert (cut.double().abs() <= exact.abs() * (1 + eps / 4)).all()
    found = deviation(cut, allowance(exact, [rounded]))
    assert found.ratio > MAX_ERROR_RATIO
    assert found.where.startswith("errors have a direction")


def test_float32_holds_small_results_beside_huge_ones_to_their_own_size() -> None:
    exact = torch.cat((torch.full((300,), 1e6), torch.full((300,), 1e-3))).double().view(-1, 1)
    near = exact.float()
    wrong = near.clone()
    wrong[300:] *= 1.01  # far below one rounding of the huge ones
    assert deviation(near, allowance(exact, [near])).ratio <= 1
    assert deviation(wrong, allowance(exact, [near])).ratio > 1e3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_result_is_infinitely_wrong(bad: float) -> None:
    exact = torch.ones(3, dtype=torch.float64)
    got = torch.tensor([1.0, bad, 1.0])
    assert deviation(got, allowance(exact, [exact.float()])).ratio == math.inf


def test_overflow_of_the_reference_is_not_judged() -> None:
    exact = torch.tensor([1e6, 1.0], dtype=torch.float64)
    near = exact.half()
    assert near[0].isinf()
    assert deviation(near, allowance(exact, [near])).ratio <= 1


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 600), st.sampled_from(FLOATS), st.floats(1e-6, 1e4))
def test_the_plain_reference_run_always_passes(n: int, dtype: torch.dtype, size: float) -> None:
    exact = torch.randn(n, dtype=torch.float64) * size
    near = (exact * (1 + torch.finfo(dtype).eps * torch.randn(n))).to(dtype)
    assert deviation(near, allowance(exact, [near])).ratio <= 1


def test_ids_are_unique_and_each_selects_itself() -> None:
    backend = get("reference")
    ids = [case.id for case in every_case(backend)]
    assert len(ids) == len(set(ids))
    assert "rms_norm-bfloat16-2x5x96-grad" in ids
    for id in ids[::97]:
        assert [case.id for case in select(backend, id=id)] == [id]


def test_filters_narrow_and_bad_ones_say_what_is_known() -> None:
    backend = get("reference")
    found = select(backend, modes=["grad"], op="gelu", dtypes=[torch.float32], real=False)
    assert found
    assert {(c.op.name, c.mode, c.dtype, c.sample.real) for c in found} == {
        ("gelu", "grad", torch.float32, False)
    }
    assert {c.mode for c in select(backend, id="gelu-*")} == {"test", "grad"}
    assert {c.mode for c in select(backend, id="gelu-*", modes=["support"])} == {"support"}
    assert {c.mode for c in select(backend, id="gelu-*-perf")} == {"perf"}
    left = select(backend, id="gelu-float32-*-test", skip=["*-1x1-*", "gelu-*-8x13696-test"])
    assert {c.sample.id for c in select(backend, id="gelu-float32-*-test")} - {
        c.sample.id for c in left
    } == {"1x1", "8x13696"}
    for wrong, message in [
        ({"op": "gelo"}, r"unknown op 'gelo'; known: .*\(did you mean gelu\?\)"),
        ({"modes": ["grid"]}, r"unknown mode 'grid'; known: .*\(did you mean grad\?\)"),
        ({"op": "gelu", "skip": ["rope-*"]}, r"skip 'rope-\*': fits none of the \d+ chosen cases"),
        (
            {"id": "gelu-float32-1x2-test"},
            r"unknown case .* \(did you mean gelu-float32-1x1-test\?\)",
        ),
    ]:
        with pytest.raises(GlmCoreError, match=message):
            select(backend, **wrong)  # type: ignore[arg-type]  # one keyword each


def _run_known(tmp_path: Path, text: str, factor: float = 1.1) -> Report:
    backend = toy()

    @backend.implements(ops.gelu)
    def gelu(x: Tensor) -> Tensor:
        return ops.gelu.reference(x) * (factor if x.shape[-1] == 33 else 1)

    known = tmp_path / "toy.txt"
    known.write_text(text)
    return run(backend, mode="test", op="gelu", real=False, known_failures=known)


def test_a_known_failure_is_an_xfail_with_its_reason(tmp_path: Path) -> None:
    report = _run_known(tmp_path, "# why\n\ngelu-*-3x*33*-test  width 33 is rounded up\n")
    known = [r for r in report.results if r.outcome == "xfail"]
    assert len(known) == 2
    assert all(r.reason.startswith("width 33 is rounded up (out: ") for r in known)
    assert report.ok


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("gelu-float32-2x5x48-test was wrong once", "known failure, but the outcome is pass"),
        (
            "gelu-float32-9x9-test no such case",
            "known failure 'gelu-float32-9x9-test' fits no case",
        ),
        ("gelu-* everything", "known failure, but the outcome is pass"),
    ],
)
def test_a_stale_known_failure_fails(tmp_path: Path, entry: str, message: str) -> None:
    report = _run_known(tmp_path, f"{entry}\ngelu-*-3x*33*-test width 33\n")
    reasons = [r.reason for r in report.failed]
    assert reasons
    assert all(r.startswith(message) and f"{tmp_path}/toy.txt:1" in r for r in reasons)


def test_an_entry_outside_the_filter_is_not_stale(tmp_path: Path) -> None:
    known = tmp_path / "reference.txt"
    known.write_text("swiglu-float32-1x1-grad elsewhere\n")
    assert run("reference", id="gelu-float32-1x1-test", known_failures=known).ok


def test_an_entry_needs_a_reason(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("gelu-float32-1x1-test\n")
    with pytest.raises(ConfigError, match=r"x\.txt:1: known failure without a reason; write"):
        load(tmp_path / "x.txt")
