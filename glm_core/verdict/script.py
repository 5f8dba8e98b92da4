"""Runs a script of the user's in a process of its own and judges it there."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from glm_core.errors import BackendUnavailableError, ConfigError, TrainingError
from glm_core.verdict.report import Report, from_json

ERRORS = {error.__name__: error for error in (ConfigError, TrainingError, BackendUnavailableError)}
"""what a script's process may report, by name"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A script, and how it is to be judged."""

    script: str
    args: list[str]
    steps: list[int]
    device: str = ""
    """torch's default device while the script runs; empty: as the script says"""
    context: str = ""
    """MODULE:CONTEXT, a context manager that is active while the script runs"""
    false_alarm_rate: float


def judge_script(request: Request) -> Report:
    """Runs the script until its last captured step and returns the verdict. What the script prints
    goes to standard error. Raises ConfigError where it cannot be started, TrainingError where it
    fails or ends before any captured step, BackendUnavailableError where the device is missing."""
    if not Path(request.script).is_file():
        raise ConfigError(f"verdict: {request.script}: no such file; pass a script after --")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        words = [sys.executable, "-m", "glm_core.verdict.worker", str(path)]
        words.append(json.dumps(dataclasses.asdict(request)))
        code = subprocess.run(words, stdout=sys.stderr, check=False).returncode
        result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "error" in result:
        raise ERRORS.get(result["kind"], TrainingError)(result["error"])
    if "report" in result:
        return from_json(result["report"])
    raise TrainingError(f"verdict: {request.script} {_end(code)}")


def _end(code: int) -> str:
    """Says how a process ended that left no result."""
    if code < 0:
        name = signal.Signals(-code).name
        why = "; often too little memory: take a smaller batch" if name == "SIGKILL" else ""
        return f"was ended by {name} before a captured step was complete{why}"
    return (
        f"ended its process with exit code {code} before a captured step was complete; "
        "pass smaller numbers with --steps, or run it alone until it works"
    )
