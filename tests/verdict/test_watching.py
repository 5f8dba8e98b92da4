"""The watch on a small model: honest steps are acquitted, planted operators are named."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from glm_core import verdict
from glm_core.errors import ConfigError, TrainingError
from glm_core.faults.aten import ATEN_FAULTS, AtenFault, Planted, aten_fault
from glm_core.verdict import references, slices
from glm_core.verdict.report import Report, from_json


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1))
        self.head = nn.Linear(32, 40)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.block(self.table(ids))
        q = x.unflatten(-1, (2, 16)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        return self.head(x + y.transpose(1, 2).flatten(-2))


def watched(
    fault: str = "", dtype: torch.dtype = torch.float32, steps: tuple[int, ...] = (2,), **adam: bool
) -> Report:
    """The verdict on two steps of a small model, perhaps with a planted fault."""
    torch.manual_seed(0)
    model, ids = Small().to(dtype), torch.randint(0, 40, (4, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **adam)
    planted = Planted(aten_fault(fault)) if fault else nullcontext()
    with planted, verdict.watch(model, optimizer, steps) as watch:
        for _ in range(2):
            loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return watch.report()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_honest_step_is_acquitted(dtype: torch.dtype) -> None:
    report = watched(dtype=dtype, fused=True)
    assert report.ok, report.sentence()
    assert report.judged > 25
    names = {r.operator for r in report.operators}
    assert {"aten::addmm", "aten::gelu_backward", "aten::_fused_adamw_"} <= names
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in names
    assert "aten::bernoulli_" in names
    assert not report.not_judged
    assert "nothing was left out" in report.sentence()
    assert from_json(report.to_json()) == report


@pytest.mark.parametrize(
    ("fault", "place"),
    [
        ("gelu: the other formula, tanh for erf", ("forward", "block.2")),
        ("native_layer_norm_backward: the mean's part is left out", ("backward", "block.0")),
        ("addcdiv_: the step 1 % too long", ("optimizer", "AdamW")),
    ],
)
def test_a_planted_operator_is_named_with_its_place(fault: str, place: tuple[str, str]) -> None:
    report = watched(fault)
    [finding] = report.findings
    assert finding.operator == aten_fault(fault).operator
    assert (finding.phase, finding.module) == place
    assert finding.line.rpartition(":")[0] == __file__
    assert finding.step == 2
    assert finding.operator in report.sentence()


def test_faults_have_names_of_their_own() -> None:
    assert len({f.name for f in ATEN_FAULTS}) == len(ATEN_FAULTS) >= 40


def judged(function: object, *args: object) -> Report:
    """The verdict on what a function of torch's does."""
    with verdict.watch(steps=(1,)) as watch:
        function(*args)  # type: ignore[operator]
    return watch.report()


def calls(report: Report) -> dict[str, int]:
    return {r.operator: r.calls for r in report.operators}


def test_writes_in_place_are_judged_once_and_on_what_was_there_before() -> None:
    def writes(x: Tensor) -> None:
        x[1:].add_(x[0])  # a view is written
        x.mul_(x)  # the argument is read and written
        x.exp_().view(-1)
        x.t_()

    x = torch.randn(4, 3)
    before = x.clone()
    report = judged(writes, x)
    assert report.ok, report.sentence()
    assert calls(report) == {"aten::add_": 1, "aten::mul_": 1, "aten::exp_": 1}
    before[1:] += before[0]
    torch.testing.assert_close(x, (before * before).exp().t())


def test_infinite_values_are_compared_and_masks_do_not_blind() -> None:
    x = torch.zeros(40, 40).masked_fill(torch.ones(40, 40).triu(1).bool(), -math.inf)
    assert judged(lambda: torch.softmax(x + torch.randn(40, 40), -1)).ok


def test_a_mask_is_judged_by_its_share() -> None:
    honest = judged(lambda: torch.empty(4000).bernoulli_(0.9))
    assert honest.ok
    fault = AtenFault("aten::bernoulli_", "", lambda f, x, p: f(x, p - 0.1))
    with Planted(fault):
        [finding] = judged(lambda: torch.empty(4000).bernoulli_(0.9)).findings
    assert "for a probability of 0.9" in finding.test
    [left] = judged(lambda: torch.rand(3)).not_judged
    assert left.reason.startswith("random")
    assert left.flops_share == 1


def test_equal_elements_may_be_chosen_otherwise() -> None:
    x = torch.randint(0, 3, (8, 64)).float()
    report = judged(lambda: (torch.topk(x, 4), x.argmax(-1), x.sort(-1)))
    assert report.ok, report.sentence()


def test_what_has_no_reference_is_left_out_until_one_is_given() -> None:
    library = torch.library.Library("verdict_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2.0001, "CPU")
    twice = torch.ops.verdict_test.twice
    [left] = judged(twice, torch.ones(3)).not_judged
    assert '@glm_core.verdict.reference("verdict_test::twice")' in left.reason
    verdict.reference("verdict_test::twice")(lambda x: 2 * x)
    try:
        [finding] = judged(twice, torch.ones(3)).findings
        assert finding.operator == "verdict_test::twice"
    finally:
        del references.GIVEN["verdict_test::twice"]


def test_of_large_results_rows_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "LARGE", 60)
    x, w = torch.randn(20, 12), torch.randn(12, 20)

    def works() -> None:
        y = torch.softmax(torch.addmm(torch.ones(20), x, w), -1)
        (y * torch.ones(20) + y.sum(0)).sigmoid()

    assert judged(works).ok
    with Planted(aten_fault("mm: the last term of each sum is left out")):
        [finding] = judged(torch.mm, x, w).findings
    assert finding.shape == [3, 20]


def test_steps_that_never_come_and_bad_numbers_are_named() -> None:
    with pytest.raises(TrainingError, match="made 2 optimizer steps, none of 9 was captured"):
        watched(steps=(9,))
    with pytest.raises(ConfigError, match=r"steps=\[0\]; pass numbers from 1"):
        verdict.watch(steps=(0,))
