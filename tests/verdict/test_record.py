"""Records of captured calls: what they hold, how another machine judges them, and bad files."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from glm_core.errors import TraceError
from glm_core.faults.aten import Planted, aten_fault
from glm_core.verdict import calls, comparison, header, render, worker
from glm_core.verdict.against import compare
from glm_core.verdict.calls import Recorded, Tensors
from glm_core.verdict.comparison import Comparison
from glm_core.verdict.oracle import Call
from glm_core.verdict.places import Place
from glm_core.verdict.record import KIND, Record, Recorder, read
from glm_core.verdict.script import Request
from glm_core.verdict.watching import watch

GELU = "gelu: the other formula, tanh for erf"


def recorded(path: Path, fault: str = "", recorder: Recorder | None = None) -> Record:
    """Returns the record of one step of a small model, perhaps with a planted fault."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    watched = watch(model, adam, steps=(1,), program="small")
    watched.mode.recorder = recorder or Recorder()
    with Planted(aten_fault(fault)) if fault else nullcontext(), watched:
        model(torch.randn(6, 8)).square().mean().backward()
        adam.step()
    watched.mode.recorder.save(path, watched.report())
    return read(path)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The content of an honest record."""
    path = tmp_path_factory.mktemp("records") / "there"
    recorded(path)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path, honest: bytes) -> Path:
    """A copy of the honest record."""
    (tmp_path / "there").write_bytes(honest)
    return tmp_path / "there"


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The record of a machine whose gelu is wrong."""
    return recorded(tmp_path_factory.mktemp("records") / "wrong", GELU)


@pytest.mark.parametrize(
    ("there", "here", "where"),
    [(GELU, "", {"aten::gelu": "there"}), ("", GELU, {"aten::gelu": "here"})],
)
def test_the_machine_that_is_wrong_is_named(
    path: Path, wrong: Record, there: str, here: str, where: dict[str, str]
) -> None:
    record = wrong if there else read(path)
    with Planted(aten_fault(here)) if here else nullcontext():
        result = compare(record, "cpu", 1e-3)
    assert result.sides() == where
    assert result.calls == len(record.calls) > 25
    assert result.equal == result.calls - len(where)
    assert not result.not_compared
    text = " ".join([result.sentence(), *(f"{k} is wrong {v}" for k, v in where.items())])
    assert text.count("is wrong") == 2 * len(where)
    assert comparison.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_what_was_wrong_there_counts_where_no_kept_call_shows_it(wrong: Record) -> None:
    kept = [c for c in wrong.calls if c[0] != "aten::gelu"]
    result = compare(dataclasses.replace(wrong, calls=kept), "cpu", 1e-3)
    assert not result.ok
    assert "judged wrong there as they ran: aten::gelu" in result.sentence()
    text = render.junit(wrong.report, result)
    assert 'name="aten::gelu" classname="verdict.against.there"' in text


def test_a_mistake_of_both_machines_is_named(wrong: Record) -> None:
    with Planted(aten_fault(GELU)):
        result = compare(wrong, "cpu", 1e-3)
    assert "aten::gelu is wrong on both machines" in result.sentence()


def test_honest_rounding_of_another_machine_is_acquitted(path: Path) -> None:
    record = read(path)
    [product] = [
        c for n, c in record.calls if n == "aten::addmm" and c and c.call.args[1].shape[1] == 16
    ]
    bias, x, w = product.call.args
    product.results["y"] = (x.flip(1) @ w.flip(0)) + bias  # another order of the terms
    result = compare(record, "cpu", 1e-3)
    assert result.ok, result.sentence()
    assert "1 differ by honest rounding" in result.sentence()


def test_what_another_cpu_may_round_inside_is_left_to_its_own_machine(path: Path) -> None:
    x = torch.randn(64, 96).bfloat16()
    call = Call(torch.ops.aten.cumsum.default, (x, 1), {}, "cpu")
    off = {"y": torch.cumsum(x, 1) * 1.1}
    there = Recorded(call, off, Place("", "f:1", "forward"), 1)
    record = dataclasses.replace(read(path), calls=[("aten::cumsum", there)])
    result = compare(record, "cpu", 1e-3)
    assert result.ok
    assert "rounds inside" in result.not_compared[0].reason
    there.call.device_type = "cuda"
    assert compare(record, "cpu", 1e-3).sides() == {"aten::cumsum": "there"}


def test_an_operator_that_is_missing_here_is_named(path: Path) -> None:
    rewrite(path, lambda fields: fields["calls"][0].update(operator="aten::of_later_times"))
    result = compare(read(path), "cpu", 1e-3)
    assert [u.operator for u in result.not_compared] == ["aten::of_later_times"]
    assert f"torch {torch.__version__} does not have it" in result.not_compared[0].reason
    nothing: Comparison = compare(read(path), "acme", 1e-3)
    assert "nothing was compared" in nothing.sentence()


def test_a_record_is_bounded(path: Path) -> None:
    recorder = Recorder(max_kept=8 * 600)
    everything = read(path)
    record = recorded(path, recorder=recorder)
    assert 0 < len(record.calls) < len(everything.calls)
    assert {why for _, why, _ in record.left_out} == {"its tensors are too large for a record"}
    recorder = Recorder()
    for _ in range(3):
        x, w = torch.randn(300, 280), torch.randn(280, 300)
        call = Call(torch.ops.aten.mm.default, (x, w), {}, "cpu")
        recorder.add(call, {"y": x @ w}, Place("", "f:1", "forward"), 1)
    assert len(recorder.rows) == 2
    held = sum(t.nbytes for t in recorder.tensors.values.values())
    assert held < 2 * 4 * 3 * (1 << 16)
    kept = calls.recorded(recorder.rows[0], recorder.tensors)
    assert kept is not None
    torch.testing.assert_close(torch.mm(*kept.call.args), kept.results["y"])


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, 4, 5).permute(2, 0, 1),
        torch.randn(3, 1).expand(3, 4),
        torch.randn(2, 3, dtype=torch.complex64).conj(),
        torch.tensor([True, False]),
        torch.tensor(2.0),
        torch.randn(4).bfloat16(),
        torch.zeros(0, 3),
        torch.ones(1).expand(7),
    ],
    ids=["turned", "repeated", "complex", "bool", "scalar", "bfloat16", "empty", "one"],
)
def test_tensors_come_back_as_they_were(x: torch.Tensor) -> None:
    tensors = Tensors()
    y = tensors.get(json.loads(json.dumps(tensors.put(x))))
    assert torch.equal(x.resolve_conj(), y)
    assert x.dtype == y.dtype
    assert x.is_complex() or x.stride() == y.stride() or x.numel() < 2


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the fields of a record."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    fields = json.loads(metadata["fields"])
    change(fields)
    save_file(tensors, path, metadata | {"fields": json.dumps(fields)})


FIRST: dict[str, Callable[[dict[str, Any]], object]] = {
    "aten::from_file": lambda row: row.update(operator="aten::from_file", args=["/tmp/x", True, 8]),
    "'/etc/passwd'": lambda row: row["args"].append("/etc/passwd"),
    "is not an operator": lambda row: row.update(operator="aten::set_", overload="source_Tensor"),
    "KeyError": lambda row: row.pop("results"),
    "a tensor of shape": lambda row: row["args"].append(row["args"][0] | {"shape": [1 << 40]}),
    "no dtype": lambda row: row["args"].append({"dtype": "nn"}),
}


def test_bad_files_are_refused_in_one_line(path: Path) -> None:
    good = path.read_bytes()
    cases: list[tuple[str, bytes]] = [
        ("cannot be read", good[:-100]),
        ("cannot be read", b"not a record"),
    ]
    for message, content in cases:
        path.write_bytes(content)
        refused(path, message)
    path.write_bytes(good)
    header.add(path, "version", "9")
    refused(path, "version '9', this glm_core reads 1")
    save_file({"x": torch.ones(1)}, path, {"kind": "other"})
    refused(path, f"kind 'other', expected '{KIND}'")
    for text, message in (
        ("{", "JSONDecodeError"),
        ("[]", "malformed fields"),
        ('{"report": 1}', ""),
    ):
        path.write_bytes(good)
        header.add(path, "fields", text)
        refused(path, message)
    path.write_bytes(good)
    header.add(path, "curve", '{"reference": 3}')
    refused(path, "malformed fields")
    refused(path / "nowhere", "no such file")


@pytest.mark.parametrize("message", FIRST)
def test_calls_that_a_record_must_not_hold_are_refused(path: Path, message: str) -> None:
    rewrite(path, lambda fields: FIRST[message](fields["calls"][0]))
    refused(path, message if message != "aten::from_file" else "record again")


def refused(path: Path, message: str) -> None:
    with pytest.raises(TraceError) as error:
        read(path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"record {path}: ")
    assert "\n" not in str(error.value)


def test_a_script_is_recorded_and_judged_against_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\n"
        "model = torch.nn.Linear(8, 4)\n"
        "sgd = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "for step in range(3):\n"
        "    model(torch.ones(2, 8)).square().mean().backward()\n"
        "    sgd.step()\n"
    )
    record = str(tmp_path / "there")
    plain: dict[str, Any] = {
        "script": str(script),
        "args": [],
        "steps": [2],
        "false_alarm_rate": 1e-3,
    }
    worker.run(Request(**plain, record=record), tmp_path / "a.json")
    worker.run(Request(**plain, against=record), tmp_path / "b.json")
    result = json.loads((tmp_path / "b.json").read_text())
    compared = comparison.from_json(result["comparison"])
    assert compared.ok
    assert compared.equal == compared.calls > 5
    with pytest.raises(TraceError, match="cannot be written"):
        worker.run(Request(**plain, record=f"{script}/no"), tmp_path / "c.json")
