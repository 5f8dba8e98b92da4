"""Compiled modules are judged by their outputs and gradients. A stand-in compiles: the compiler
itself loads for seconds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glm_core import verdict
from glm_core.faults.aten import Planted, aten_fault
from glm_core.verdict import boundary
from glm_core.verdict.report import Report

WRONG = "addmm: the bias is left out"


class Stood(nn.Module):
    """Stands for what torch.compile returns: it is wrong while the stance is `default`."""

    stance = "default"

    def __init__(self, module: nn.Module, fault: str) -> None:
        super().__init__()
        self._orig_mod, self.fault = module, fault

    def forward(self, x: Tensor) -> Tensor:
        wrong = self.fault and Stood.stance == "default"
        with Planted(aten_fault(self.fault)) if wrong else nullcontext():
            y: Tensor = self._orig_mod(x)
        return y


class stance:
    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.before, Stood.stance = Stood.stance, self.name

    def __exit__(self, *error: object) -> None:
        Stood.stance = self.before


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary, "compiled_class", lambda: Stood)
    monkeypatch.setattr(torch.compiler, "set_stance", stance)
    monkeypatch.setattr(Stood, "stance", "default")


class Normed(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(dropout))
        self.outer = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.outer(self.inner(x))
        return y


def report_of(
    make: Callable[[], nn.Module], fault: str = "", dtype: torch.dtype = torch.float32
) -> tuple[Report, nn.Module]:
    torch.manual_seed(0)
    module = make().to(dtype)
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    compiled = Stood(module, fault)
    x = torch.randn(12, 16, dtype=dtype)
    with verdict.watch(steps=(2,)) as watch:
        for step in range(2):
            with stance("force_eager" if step else "default"):  # as the watch has it
                compiled(x).square().mean().backward()
            sgd.step()
            sgd.zero_grad()
    return watch.report(), module


def row(report: Report) -> Any:
    [found] = [r for r in report.operators if r.operator == "compiled Normed"]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_module_that_is_right_is_acquitted(dtype: torch.dtype) -> None:
    report, module = report_of(Normed, dtype=dtype)
    assert report.ok, report.sentence()
    assert row(report).calls == 1
    buffers = dict(module.named_buffers())
    assert int(buffers["outer.0.num_batches_tracked"]) == 2  # judging leaves no trace
    assert "__call__" not in Stood.__dict__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_that_computes_something_else_is_named(dtype: torch.dtype) -> None:
    report, _ = report_of(Normed, WRONG, dtype)
    [finding] = report.findings  # the operators are judged without the compiler
    assert finding.operator == "compiled Normed"
    assert finding.module == "Normed"
    assert finding.result.startswith(("output 0", "gradient of "))
    assert "test_boundary.py:" in finding.line


def test_what_cannot_be_run_again_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report, _ = report_of(lambda: Normed(0.5), WRONG)
    [left] = [u for u in report.not_judged if u.operator == "compiled Normed"]
    assert "it draws random numbers" in left.reason
    monkeypatch.setattr(boundary, "MAX_WEIGHTS", 100)
    report, _ = report_of(Normed, WRONG)
    [left] = report.not_judged
    assert "more than 100 weights" in left.reason
