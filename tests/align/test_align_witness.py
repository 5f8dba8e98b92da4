"""The op calls of a training step in a witness file: an H100's are acquitted, wrong ones are not,
and what a backend records can be judged again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import markov
import pytest
import torch
from torch import Tensor

from glm_core import ops
from glm_core.align.disguise import Exact
from glm_core.align.replay import replay
from glm_core.align.witness import judge, record_step, recorded
from glm_core.backends import registry
from glm_core.cli import main
from glm_core.conformance import witness
from glm_core.faults.activation import gated
from glm_core.faults.kernels import changed
from glm_core.ops.precision import wide

H100 = Path(__file__).parents[1] / "conformance" / "witness" / "h100.safetensors"


def test_the_h100s_step_is_acquitted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", "witness", str(H100)]) == 0
    out = capsys.readouterr().out
    assert float(out.split("largest ratio ")[1]) <= 0.7
    assert "cuda on NVIDIA H100 80GB HBM3: 0 of " in out


def test_a_scale_that_is_off_by_half_a_percent_is_guilty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = witness.load(H100)
    wrong.calls = [row for row in wrong.calls if row["op"] == "attention"]
    name = "call|31|result|d_v"
    wrong.tensors[name] = (wrong.tensors[name].float() * 1.005).bfloat16()
    wrong.save(tmp_path / "wrong.safetensors")
    assert main(["align", "witness", str(tmp_path / "wrong.safetensors"), "--json"]) == 1
    guilty = json.loads(capsys.readouterr().out)["guilty"]
    assert {(f["op"], f["layer"], f["tensor"]) for f in guilty if f["layer"]} == {
        ("attention", "3", "d_v")
    }


def one_head(factor: float) -> Callable[..., Any]:
    """Attention whose second head has another scale."""

    def kernel(**a: Any) -> Tensor:
        other = ops.attention.reference(**a | {"scale": a["scale"] * factor})
        y: Tensor = ops.attention.reference(**a)
        return torch.cat((y[:, :, :1], other[:, :, 1:2], y[:, :, 2:]), 2)

    return kernel


def scaled_rope(**a: Any) -> Tensor:
    y: Tensor = 1.0001 * ops.rope.reference(**a | {"x": wide(a["x"])})
    return y.to(a["x"].dtype)


def first_row_lost(**a: Any) -> Tensor:
    y: Tensor = ops.rope.reference(**a)
    return torch.cat((torch.zeros_like(y[:, :1]), y[:, 1:]), 1)


PLANTED: dict[str, tuple[str, Callable[..., Any]]] = {
    "a scale of 1.0001": ("rope", scaled_rope),
    # this step's gates are small: of 10,000 results of the tanh form not one rounds otherwise
    "x sigmoid(1.702 x) for erf": ("geglu", gated(lambda x: x * torch.sigmoid(1.702 * x), 1)),
    "epsilon 2e-5": ("layer_norm", changed(ops.layer_norm, eps=2e-5)),
    "a dropped row": ("rope", first_row_lost),
    "one head's scale": ("attention", one_head(1.01)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_fault_on_top_of_the_h100s_results_is_guilty(name: str) -> None:
    """The fault moves what would be rounded, so it changes the device's results where their
    rounding changes."""
    op, kernel = PLANTED[name]
    file = witness.load(H100)
    file.calls = [row for row in file.calls if row["op"] == op]
    for call, results in recorded(file):
        right, wrong = (
            replay(call, function, Exact(), widen=True) for function in (call.op.reference, kernel)
        )
        for result, y in results.items():
            fault = wrong[result].to(y.dtype).double() - right[result].to(y.dtype).double()
            key = f"call|{call.index}|result|{result}"
            file.tensors[key] = (y.double() + fault).to(y.dtype)
    findings = judge(file)
    assert findings[0].ratio > 1, findings[0]
    assert {f.op for f in findings if f.ratio > 1} == {op}


def test_a_recorded_step_is_judged_again(tmp_path: Path) -> None:
    backend = registry.usable("reference")
    made = witness.new(backend)
    assert record_step(made, markov.config("bfloat16"), "bfloat16", markov.Markov(), backend) == []
    made.save(tmp_path / "w.safetensors")
    again = witness.load(tmp_path / "w.safetensors")
    assert {row["op"] for row in again.calls} >= {"embedding", "attention", "global_norm", "adamw"}
    findings = judge(again)
    assert findings[0].ratio < 1
    assert {f.tensor for f in findings if f.op == "adamw"} >= {"params", "change"}


def test_a_call_of_an_op_that_is_gone_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = witness.load(H100)
    old.calls[0]["op"] = "gone"
    old.save(tmp_path / "old.safetensors")
    assert main(["align", "witness", str(tmp_path / "old.safetensors")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "a recorded call does not fit this glm_core's ops (KeyError('gone')); judge it" in line
