"""The command line: help without torch, one-line errors, exit codes, JSON keys that others rely
on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glm_core import versions
from glm_core.backends import registry
from glm_core.cli import COMMANDS, main

RUN = [
    "--steps",
    "2",
    "--set",
    "model.num_layers=1",
    "--set",
    "model.hidden=32",
    "--set",
    "data.length=32",
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Writes a text large enough for a tiny tokenizer."""
    import pydoc_data.topics as t

    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(list(t.topics.values())[:20]), encoding="utf-8")
    return path


@pytest.mark.parametrize("command", [[], *([c] for c in COMMANDS)], ids=["top", *COMMANDS])
def test_help_loads_no_torch(command: list[str]) -> None:
    code = (
        "import sys; from glm_core.cli import main\n"
        f"try: main({[*command, '--help']!r})\nexcept SystemExit: pass\n"
        "bad = {'torch', 'numpy', 'onnxruntime', 'transformers'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "usage: glm-core" in done.stdout


FOLDERS = (
    "align run --out",
    "checkpoint convert a",
    "doctor --out",
    "export",
    "quantize a --out",
    "train --out",
)


@pytest.mark.parametrize(
    "command",
    [
        "verdict --junit",
        "verdict --sarif",
        "verdict --report",
        "verdict --record",
        "align record --backend cpu --out",
        "align compare a b --report",
        "conformance --junit",
        "conformance --record",
        "bench ops --html",
        "bench ops --out",
        *FOLDERS,
    ],
)
def test_a_result_that_cannot_be_written_is_refused_before_the_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "x", "/dev/null/x" if command in FOLDERS else tmp_path):
        with pytest.raises(SystemExit, match="2"):
            main([*command.split(), str(place)])
        assert f"{place}: cannot be written (" in capsys.readouterr().err


def test_devices_names_every_backend_with_reason_or_usable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["devices", "--json"]) == 0
    rows = {r["name"]: r for r in json.loads(capsys.readouterr().out)["devices"]}
    assert rows["reference"]["usable"] is True
    assert {"cpu", "null", "onnxrt", "reference"} <= set(rows)
    for row in rows.values():
        assert row["usable"] or row["reason"], row
        assert row["verified"] or row["reason"], row


@pytest.mark.parametrize(
    ("release", "notes"),
    [
        (
            "2.9.0+das.opt1.dtk2604",
            [
                "glm-core plan dry-run needs torch 2.11 or newer; here is 2.9.0+das.opt1.dtk2604",
                "the schedule zero-bubble or zbv needs torch 2.13 or newer; here is 2.9.0+das.opt1."
                "dtk2604",
            ],
        ),
        ("2.13.0", []),
        ("3.1.0", ["torch 3.1.0 is newer than any that was tried (2.15)"]),
    ],
)
def test_devices_says_what_this_torch_cannot_do(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    release: str,
    notes: list[str],
) -> None:
    monkeypatch.setattr(versions, "torch_version", lambda: release)
    assert main(["devices", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == notes
    assert main(["devices"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[len(lines) - len(notes) :] == notes
    table = lines[: len(registry.names()) + 1]
    assert [line.split()[0] for line in table] == ["backend", *registry.names()]
    assert max(map(len, table)) < 80  # a terminal's width: reasons stand below the table


def test_devices_lists_an_accelerator_that_has_no_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = torch.device("mps")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: found)
    assert main(["devices", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["devices"][-1]
    assert (row["name"], row["device"]) == ("reference:mps", "mps")
    assert (row["usable"], row["verified"]) == (False, "never run")
    assert row["reason"].startswith("torch cannot use device 'mps': ")


def test_ops_table_comes_from_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ops", "--json"]) == 0
    ops = {o["name"]: o["backends"] for o in json.loads(capsys.readouterr().out)["ops"]}
    for name, cells in ops.items():
        assert cells["reference"] == "reference"
        assert cells["cpu"] == ("kernel" if name in registry.get("cpu").kernels else "reference")


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["ops", "rms_nrm"], 2, "unknown op 'rms_nrm'; known:"),
        (["train", "--backend", "cpx"], 2, "did you mean cpu?"),
        (["train", "--preset", "tinny"], 2, "did you mean tiny?"),
        (["train", "--set", "train.stepz=3"], 2, "did you mean train.steps?"),
        (["train", "--set", "model.num_heads=5"], 2, "num_heads"),
        (["train", "--backend", "reference:nosuch"], 3, "is not available here"),
        (["train", "--data", "/nonexistent/file"], 2, "/nonexistent/file"),
        (["train", "--config", "/nonexistent.toml"], 2, "no such file"),
        (["align", "run", "--dtypes", "float31"], 2, "did you mean float32?"),
        (["align", "run", "--backends", "onxrt"], 2, "did you mean onnxrt?"),
        (["align", "compare", "/no/a.trace", "/no/b.trace"], 2, "/no/a.trace"),
        (["conformance"], 2, "no backend named"),
        (["conformance", "--backend", "cpu", "--id", "rms_norm-nothing"], 2, "rms_norm-nothing"),
    ],
    ids=lambda v: v[-1] if isinstance(v, list) else None,
)
def test_bad_input_is_one_line_and_a_code(
    argv: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == code
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("glm-core: ")
    assert err.count("\n") == 1, err


def test_train_writes_results_and_resumes(
    tmp_path: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [
        "train",
        *RUN,
        "--set",
        "data.vocab=512",
        "--data",
        str(corpus),
        "--backend",
        "reference",
    ]
    assert main([*argv, "--out", "run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 2
    assert result["fallbacks"] == []
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[-1]["loss"] == result["loss"]
    assert main([*argv, "--out", "run"]) == 2
    assert "resume" in capsys.readouterr().err
