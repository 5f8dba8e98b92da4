"""Scripts under the watch: what the command prints and writes, and how scripts fail."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rooms import ROOT

from glm_core import cli
from glm_core.errors import BackendUnavailableError, ConfigError, TrainingError
from glm_core.verdict import render, script, worker
from glm_core.verdict.report import Report, from_json
from glm_core.verdict.script import Request, run_script

TRAIN = """
import sys, torch
model = torch.nn.Linear(8, 4)
adam = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    model(torch.ones(2, 8)).square().mean().backward()
    adam.step()
    if sys.argv[1:] == [str(step)]:
        raise ValueError("bad\\nbatch")
raise RuntimeError("ran on after the last captured step")
"""
SEEDED = """
import torch
torch.manual_seed(0)
model = torch.nn.Linear(8, 4)
adam = torch.optim.AdamW(model.parameters(), lr=0.1)
for step in range(20):
    model(torch.randn(2, 8)).square().mean().backward()
    adam.step()
    adam.zero_grad()
"""
CONTEXT = """
from contextlib import nullcontext as nothing
from glm_core.faults.aten import Planted, aten_fault
wrong = lambda: Planted(aten_fault("addmm: the bias is left out"))
number = 3
def no_device(): raise OSError("no device\\nwas found")
class Asleep:
    def __enter__(self): raise RuntimeError("the device is asleep")
    def __exit__(self, *error): pass
"""


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


def request_for(folder: Path, text: str = TRAIN, *args: str, **options: object) -> Request:
    (folder / "train.py").write_text(text)
    (folder / "contexts_of_a_test.py").write_text(CONTEXT)
    fields = {"steps": [2], "false_alarm_rate": 1e-3} | options
    return Request(script=str(folder / "train.py"), args=list(args), **fields)  # type: ignore[arg-type]


def run_here(request: Request, folder: Path) -> dict[str, Any]:
    worker.run(request, folder / "result.json")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def result_of(request: Request, folder: Path) -> Report:
    return from_json(run_here(request, folder)["report"])


def test_a_script_is_judged_up_to_its_last_captured_step(tmp_path: Path) -> None:
    report = result_of(request_for(tmp_path), tmp_path)
    assert report.ok
    assert (report.program, report.steps, report.devices) == ("train.py", [2], ["cpu"])
    assert "all" in report.sentence()
    assert report.sentence() in render.text(report)


def test_the_default_device_is_the_scripts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str | None] = []
    monkeypatch.setattr(torch, "set_default_device", devices.append)
    assert result_of(request_for(tmp_path, device="cpu"), tmp_path).ok
    assert devices == ["cpu", None]


def test_a_context_that_computes_wrong_is_named_at_its_line(tmp_path: Path) -> None:
    request = request_for(tmp_path, context="contexts_of_a_test:wrong")
    report = result_of(request, tmp_path)
    [finding] = report.findings
    assert finding.operator == "aten::addmm"
    assert finding.line == f"{tmp_path / 'train.py'}:6"
    assert "with contexts_of_a_test:wrong" in report.sentence()
    [run] = json.loads(render.sarif(report))["runs"]
    [result] = run["results"]
    region = result["locations"][0]["physicalLocation"]["region"]
    assert (result["ruleId"], region["startLine"]) == ("aten::addmm", 6)
    suite = ElementTree.fromstring(render.junit(report))
    failed = [c.get("name") for c in suite if c.find("failure") is not None]
    assert failed == ["aten::addmm"]
    assert f"WRONG {finding}" in render.text(report)


def test_the_command_judges_plain_and_with_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "run_script", lambda request: run_here(request, tmp_path))
    path = request_for(tmp_path).script
    files = {f"--{kind}": str(tmp_path / f"out.{kind}") for kind in ("junit", "sarif", "report")}
    words = [w for option in files.items() for w in option]
    context = ["--with", "contexts_of_a_test:wrong"]
    assert cli.main(["verdict", *words, *context, "--json", "--", path]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["verdict"], result["plain"]["verdict"]) == ("guilty", "honest")
    assert all(Path(file).stat().st_size for file in files.values())
    assert cli.main(["verdict", "--steps", "2", path]) == 0
    assert cli.main(["verdict", "--steps", "two", path]) == cli.main(["verdict"]) == 2


def test_the_commands_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU, with a context of ours in place of FlagGems and of the compiler's."""
    monkeypatch.setattr(script, "run_script", lambda request: run_here(request, tmp_path))
    monkeypatch.chdir(tmp_path)
    request_for(tmp_path, SEEDED)
    page = (ROOT / "docs" / "verdict.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\s*(?:- )?(?:run: )?glm-core (verdict .*)$", page, re.M)
    assert len(commands) >= 9
    nothing = "contexts_of_a_test:nothing"
    here = {"cuda": "cpu", "flag_gems:use_gems": nothing, "glm_core.verdict:eager": nothing}
    for words in dict.fromkeys(commands):
        assert cli.main([here.get(word, word) for word in shlex.split(words)]) == 0, words
    out = capsys.readouterr().out
    assert "on cpu with contexts_of_a_test:nothing" in out
    assert "there: train.py on cpu" in out
    assert "the loss curve is the reference's to the bit (20 steps, 6 control runs)" in out
    written = [p.name for p in tmp_path.iterdir() if p.name.startswith(("verdict.", "there."))]
    assert sorted(written) == sorted(
        set(re.findall(r"(?:verdict|there)\.[a-z]+", " ".join(commands)))
    )


@pytest.mark.parametrize(
    ("text", "args", "options", "error", "message"),
    [
        (TRAIN, ["0"], {}, TrainingError, "after 1 optimizer steps, failed: ValueError: bad batch"),
        ("raise SystemExit(5)", [], {}, TrainingError, "exited: 5"),
        ("x = 1", [], {}, TrainingError, "made 0 optimizer steps, none of 2 was captured"),
        (TRAIN, [], {"context": "contexts_of_a_test:no"}, ConfigError, "MODULE:CONTEXT"),
        (TRAIN, [], {"context": "contexts_of_a_test:number"}, ConfigError, "no context manager"),
        (TRAIN, [], {"context": "contexts_of_a_test:no_device"}, ConfigError, "no device was fou"),
        (TRAIN, [], {"context": "contexts_of_a_test:Asleep"}, ConfigError, "the device is asleep"),
        (TRAIN, [], {"device": "acme"}, BackendUnavailableError, "--on acme"),
    ],
)
def test_a_script_without_a_verdict_says_why(
    tmp_path: Path,
    text: str,
    args: list[str],
    options: dict[str, object],
    error: type,
    message: str,
) -> None:
    request = request_for(tmp_path, text, *args, **options)
    with pytest.raises(error, match=message):
        worker.run(request, tmp_path / "result.json")


@pytest.mark.parametrize(
    "words",
    [["--false-alarm-rate", "2"], ["--curve", "-1"], ["--curve", "5", "--controls", "1"]],
    ids=" ".join,
)
def test_numbers_that_judge_nothing_are_refused_before_the_script_runs(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verdict", *words, "--record", "r.safetensors", "--", "no_script.py"]) == 2
    assert f"verdict: {words[-2]} {words[-1]}; " in capsys.readouterr().err


def test_a_launcher_that_ends_the_command_ends_the_script_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in, told = tmp_path / "slow", tmp_path / "pid"
    stand_in.write_text(f"#!/bin/sh\necho $$ > {told}\nkill -TERM {os.getpid()}\nexec sleep 60\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        run_script(request_for(tmp_path))
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_script_that_ends_its_process_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        run_script(Request(script="no.py", args=[], steps=[2], false_alarm_rate=1e-3))
    for program, message in (("false", "exit code 1 before"), ("kill", "SIGKILL.*smaller batch")):
        stand_in = tmp_path / program
        stand_in.write_text("#!/bin/sh\n" + ("exit 1\n" if program == "false" else "kill -9 $$\n"))
        stand_in.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(stand_in))
        with pytest.raises(TrainingError, match=message):
            run_script(request_for(tmp_path))
