"""Loss curves of scripts that know nothing of it: followed, moved by a unit, judged."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from glm_core.errors import ConfigError
from glm_core.verdict import outcome, page, render, script, worker
from glm_core.verdict.curve import move, sketch
from glm_core.verdict.envelope import CurveVerdict, judge_curve
from glm_core.verdict.script import Request

TRAIN = """
import os, torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(6):
    x = torch.randn(12, 8)
    (model(x) - x[:, :4]).square().mean().backward()
    adam.step()
    adam.zero_grad()
"""
CONTEXT = """
from contextlib import nullcontext
from glm_core.faults.aten import Planted, aten_fault
right = nullcontext
wrong = lambda: Planted(aten_fault("addmm: the bias is left out"))
"""


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs scripts in this process."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "contexts_of_curves.py").write_text(CONTEXT)

    def run_script(request: Request) -> dict[str, Any]:
        worker.run(request, tmp_path / "result.json")
        result: dict[str, Any] = json.loads((tmp_path / "result.json").read_text())
        return result

    monkeypatch.setattr(script, "run_script", run_script)


def request_for(folder: Path, text: str = TRAIN, **options: Any) -> Request:
    (folder / "train.py").write_text(text)
    fields: dict[str, Any] = {"steps": [1], "false_alarm_rate": 1e-3, "curve_steps": 5} | options
    return Request(script=str(folder / "train.py"), args=[], **fields)


@pytest.mark.parametrize("name", ["right", "wrong"])
def test_a_context_is_judged_by_the_curve_of_the_plain_run(tmp_path: Path, name: str) -> None:
    heard: list[str] = []
    request = request_for(tmp_path, context=f"contexts_of_curves:{name}")
    judged = outcome.judge_all(request, 4, heard.append)
    curve = judged.curve
    assert curve is not None
    assert len(curve.loss) == len(curve.bound) == 5
    assert len({tuple(c) for c in [curve.reference, *curve.controls]}) >= 4
    assert "honest rounding" in heard[0]
    assert heard[-1] == "control run 4 of 4 is complete"
    assert judged.ok == curve.ok == (name == "right")
    text = page.write(judged, tmp_path / "page.html").read_text()
    assert "Distance from the reference" in text
    assert ("leaves its envelope at step 1" in text) == (name == "wrong")
    assert ("<failure" in render.junit(judged.report, None, curve)) == (name == "wrong")
    assert judged.to_json()["curve"]["first_step"] == (None if name == "right" else 1)


def test_a_record_carries_its_curve_to_the_other_machine(tmp_path: Path) -> None:
    record = str(tmp_path / "there")
    there = outcome.judge_all(request_for(tmp_path, record=record), 4, print)
    assert there.curve is not None
    assert "judged by --against" in there.curve.missing
    request = request_for(tmp_path, against=record, curve_steps=0)
    judged = outcome.judge_all(request, 4, print)
    assert judged.curve is not None
    assert judged.comparison is not None
    assert "to the bit (5 steps, 4 control runs)" in judged.sentences()[-1]
    text = page.write(judged, tmp_path / "page.html").read_text()
    assert "have the same bits" in text


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("torch.manual_seed(0)", "torch.seed()", "start with other weights"),
        (
            "    x = torch.randn(12, 8)",
            "    torch.seed(); x = torch.randn(12, 8)",
            "other gradients",
        ),
        (
            ".mean().backward()",
            ".sum(0).backward(torch.ones(4))",
            "backward was called on no scalar",
        ),
        (
            "import os, torch",
            "import torch, os\nmark: 1 / 0",
            "gave no curve: verdict: .*ZeroDivision",
        ),
    ],
)
def test_where_there_is_no_envelope_the_reason_is_given(
    tmp_path: Path, old: str, new: str, reason: str
) -> None:
    again = tmp_path / "again"
    new = new.replace("mark: ", f"if os.path.exists({str(again)!r}): ")
    text = TRAIN.replace(old, new) + f"\nos.makedirs({str(again)!r}, exist_ok=True)"
    request = request_for(
        tmp_path, text.replace("range(6)", "range(4)"), record=str(tmp_path / "r")
    )
    judged = outcome.judge_all(request, 4, print)
    assert judged.curve is not None
    assert re.search(reason, judged.curve.missing)
    assert judged.ok


def test_options_that_give_no_curve_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no second curve"):
        outcome.judge_all(request_for(tmp_path), 4, print)
    both = request_for(tmp_path, record="r", context="contexts_of_curves:right")
    with pytest.raises(ConfigError, match="pass one"):
        outcome.judge_all(both, 4, print)


def test_a_curve_that_is_not_finite_is_outside() -> None:
    curve = {"loss": [3.0, 2.0], "weights": [0.1] * 3, "gradients": [0.2] * 3}
    controls = [curve | {"loss": [3.0 + k * 1e-6, 2.0 - k * 1e-6]} for k in (1, -1, 2, -2)]
    bad = judge_curve(curve, controls, curve | {"loss": [3.0, None]}, 1e-3)
    assert bad.first_step == 2
    assert json.loads(json.dumps(bad.to_json()))["loss"] == [3.0, 1e30]
    few: CurveVerdict = judge_curve(curve, controls[:3], curve, 1e-3)
    assert few.sentence().endswith("3 control runs, 4 at least are needed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_move_by_a_unit(dtype: torch.dtype) -> None:
    layer = nn.Linear(40, 30).to(dtype)
    layer.weight.data[0, 0] = 0
    before = copy.deepcopy(layer)
    state = torch.get_rng_state()
    move(list(layer.parameters()), 1, 0.0)
    assert torch.equal(layer.weight, before.weight) == (dtype == torch.bfloat16)
    move(list(layer.parameters()), 2, torch.finfo(dtype).eps)
    change = ((layer.weight - before.weight).double() / before.weight.double()).nan_to_num()
    assert 0 < change.abs().max() < 4 * torch.finfo(dtype).eps
    assert 0.5 < (change != 0).double().mean() < 0.9
    assert torch.equal(state, torch.get_rng_state())


def test_sketches_see_other_values_and_not_rounding() -> None:
    x = [torch.randn(30, 20), torch.randint(0, 99, (8,))]
    near = [x[0] * (1 + 1e-6), x[1]]
    assert max(abs(a - b) for a, b in zip(sketch(x), sketch(near), strict=True)) < 1e-4
    other = [torch.randn(30, 20), x[1]]
    far = [torch.randn(30, 20)]
    assert max(abs(a - b) for a, b in zip(sketch(x[:1]), sketch(far), strict=True)) > 0.02
    assert sketch(other) != sketch(x)
