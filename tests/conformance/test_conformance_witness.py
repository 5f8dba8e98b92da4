"""The chip as a witness: what an H100 gave is judged here by today's rules, without the H100. Right
results are acquitted; results as miscompiled kernels would have given them are rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from glm_core.backends import registry
from glm_core.cli import main
from glm_core.conformance import witness
from glm_core.conformance.case import Case, select
from glm_core.conformance.oracle import Results, compute
from glm_core.conformance.rejudge import GONE, OTHER_INPUTS, rejudge
from glm_core.conformance.witness import KIND, Witness

H100 = Path(__file__).parent / "witness" / "h100.safetensors"
KNOWN = Path(__file__).parent / "xfails" / "h100-witness.txt"
SAME_DRAWS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
"""whether this CPU rounds random draws as the H100's host did, so that every case can be judged"""
NORMS = ("add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm")
FEW_ROWS = 32
"""quantized_linear stored one result at a time for at most so many rows"""


@pytest.fixture(scope="module")
def h100() -> Witness:
    return witness.load(H100)


def test_the_h100_is_acquitted_but_for_what_is_known(h100: Witness) -> None:
    report = rejudge(h100, H100, known_failures=KNOWN)
    assert not report.failed, [(r.id, r.reason) for r in report.failed]
    assert {r.reason for r in report.results if r.outcome == "unsupported"} <= {OTHER_INPUTS}
    if SAME_DRAWS:
        assert (report.count("pass"), report.count("xfail"), len(report.results)) == (881, 2, 883)
    assert report.machine["device"] == "NVIDIA H100 80GB HBM3"


def stored_one_by_one(case: Case) -> list[str]:
    """Names the float16 results that the kernels of the first run stored one at a time."""
    if case.op.name in NORMS and case.mode == "grad":
        return ["d weight", "d bias"]
    if case.op.name == "quantized_linear" and case.mode == "test":
        x: Tensor = case.sample.make(case.dtype)["x"]
        return ["out"] if x.numel() // x.shape[-1] <= FEW_ROWS else []
    return ["copies"] if case.op.name == "adamw" else []


def miscompiled(y: Tensor) -> Tensor:
    """Returns halves whose low byte is their value, converted to 0..255, as ptxas made of it."""
    value = y.float().trunc().clamp(0, 255).short()
    return ((y.view(torch.int16) & ~0xFF) | value).view(torch.float16)


def spoiled(results: Results, names: list[str]) -> Results:
    """Returns the results with the named ones, `d weight from out[1]` included, as miscompiled."""
    hit = [n for n, y in results.items() if y.dtype == torch.float16 and n.startswith(tuple(names))]
    return results | {name: miscompiled(results[name]) for name in hit}


@pytest.mark.skipif(not SAME_DRAWS, reason="this CPU gives most of the cases other inputs")
def test_the_67_results_of_the_miscompiled_kernels_are_rejected(h100: Witness) -> None:
    recorded, wrong = h100.cases(), Witness(backend="cuda", environment={})
    for case in select(registry.usable("reference"), dtypes=[torch.float16]):
        if case.sample.large or not (names := stored_one_by_one(case)):  # large ones are newer
            continue
        results = recorded.get(case.id)
        if results is None:  # too large for the file, so the reference's own
            results = compute(case, case.op.reference, case.sample.make(case.dtype))
        wrong.keep(case, spoiled(results, names))
    failed = [r.id for r in rejudge(wrong, "wrong.safetensors").failed]
    assert len(failed) == 67
    assert sum(id in recorded for id in failed) == 58


def small() -> Witness:
    """Returns a witness of two cases, as a backend would record them."""
    made = witness.new(registry.usable("reference"))
    for case in select(registry.usable("reference"), op="gelu", dtypes=[torch.float32])[:18:9]:
        made.keep(case, compute(case, case.op.reference, case.sample.make(case.dtype)))
    return made


def test_a_case_that_is_gone_or_has_other_inputs_is_counted_and_not_judged() -> None:
    made = small()
    kept, changed = list(made.inputs)
    made.inputs[changed] = "0" * 16
    made.tensors["case|gelu-float32-gone-test|out"] = torch.zeros(1)
    report = rejudge(made, "w.safetensors")
    skipped = {r.id: r.reason for r in report.results if r.outcome == "unsupported"}
    assert skipped == {changed: OTHER_INPUTS, "gelu-float32-gone-test": GONE}
    assert [r.id for r in report.results if r.outcome == "pass"] == [kept]


def test_other_shapes_dtypes_and_names_are_failures() -> None:
    made = small()
    first, second = (n for n in made.tensors)
    made.tensors[first] = made.tensors[first].double()
    made.tensors[second + "x"] = made.tensors.pop(second)
    reasons = [r.reason for r in rejudge(made, "w.safetensors").failed]
    assert "dtype must be torch.float32; received torch.float64" in reasons[0]
    assert reasons[1].startswith("results [")


def test_a_backend_is_recorded_and_judged_by_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = ["conformance", "--backend", "reference", "--id", "gelu-*-2x5x48-test"]
    assert main([*run, "--record", "w.safetensors"]) == 0
    printed = capsys.readouterr().out
    judge = ["conformance", "--witness", "w.safetensors"]
    assert main(judge) == 0
    assert capsys.readouterr().out == printed
    made = witness.load("w.safetensors")
    name = next(n for n in made.tensors if n.endswith("test|out"))
    made.tensors[name] = made.tensors[name] + 1
    made.save("wrong.safetensors")
    judge[-1] = "wrong.safetensors"
    assert main([*judge, "--json", "--junit", "junit.xml"]) == 1
    out = json.loads(capsys.readouterr().out)
    assert (out["failed"], out["machine"]["device"]) == (1, "cpu")
    [failure] = ElementTree.parse("junit.xml").iter("failure")
    id = name.split("|")[1]
    assert failure.text == f"glm-core conformance --witness wrong.safetensors --id {id}"
    assert main([*judge, "--op", "rope"]) == 2
    assert "none of its 4 cases matches" in capsys.readouterr().err


def bad_file(path: Path, how: str) -> None:
    """Writes a witness that cannot be judged."""
    small().save(path)
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "truncated in its header":
        path.write_bytes(content[:100])
    elif how == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "of another version":
        metadata: dict[str, Any] = {"kind": KIND, "version": "99"}
        save_file({"a": torch.zeros(1)}, path, metadata)
    elif how == "another file of tensors":
        save_file({"a": torch.zeros(1)}, path)
    elif how == "text":
        path.write_text("no tensors at all\n")
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("truncated", "truncated or damaged"),
        ("truncated in its header", "truncated or damaged"),
        ("changed", "the sha256 of its content differs"),
        ("of another version", "its format is version 99, this glm_core reads 1; judge it with"),
        ("another file of tensors", "this is no witness file; pass a file of"),
        ("text", "this is no witness file; pass a file of"),
        ("absent", "No such file or directory; pass a file of"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(
    how: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "w.safetensors"
    bad_file(path, how)
    assert main(["conformance", "--witness", str(path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"witness {path}: {expected}" in line


def test_a_witness_is_judged_without_a_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "--backend", "cpu", "--witness", str(H100)]) == 2
    assert "leave out --backend and --record" in capsys.readouterr().err
