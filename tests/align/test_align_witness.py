"""The op calls of a training step in a witness file: an H100's are acquitted, wrong ones are not,
and what a backend records can be judged again."""

from __future__ import annotations

import json
from pathlib import Path

import markov
import pytest

from glm_core.align.witness import judge, record_step
from glm_core.backends import registry
from glm_core.cli import main
from glm_core.conformance import witness

H100 = Path(__file__).parents[1] / "conformance" / "witness" / "h100.safetensors"


def test_the_h100s_step_is_acquitted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", "witness", str(H100)]) == 0
    assert "cuda on NVIDIA H100 80GB HBM3: 0 of " in capsys.readouterr().out


def test_a_scale_that_is_off_by_half_a_percent_is_guilty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = witness.load(H100)
    name = "call|31|result|d_v"
    wrong.tensors[name] = (wrong.tensors[name].float() * 1.005).bfloat16()
    wrong.save(tmp_path / "wrong.safetensors")
    assert main(["align", "witness", str(tmp_path / "wrong.safetensors"), "--json"]) == 1
    guilty = json.loads(capsys.readouterr().out)["guilty"]
    assert {(f["op"], f["layer"], f["tensor"]) for f in guilty if f["layer"]} == {
        ("attention", "3", "d_v")
    }


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
