"""Runs a script of the user's in a process of its own and judges it there."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from glm_core.errors import (
    BackendUnavailableError,
    ConfigError,
    TraceError,
    TrainingError,
)

ERRORS = {
    error.__name__: error
    for error in (ConfigError, TrainingError, BackendUnavailableError, TraceError)
}
"""what a script's process may report, by name"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A script, and how it is to be judged; without one, the record alone is."""

    script: str
    args: list[str]
    steps: list[int]
    device: str = ""
    """torch's default device while the script runs; empty: as the script says"""
    context: str = ""
    """MODULE:CONTEXT, a context manager that is active while the script runs"""
    false_alarm_rate: float
    record: str = ""
    """file to write the captured calls to"""
    against: str = ""
    """record whose calls are computed here again"""
    curve_steps: int = 0
    """optimizer steps whose loss is followed"""
    control: int = 0
    """number of a control run, in which nothing is captured; 0: no control run"""
    unit: float = 0.0
    """see `Curve`"""
    run: int = 0
    """number of the run, the same on all ranks of a job"""


_RUNS = itertools.count(1)


def run_script(request: Request) -> dict[str, Any]:
    """Runs the script until its last captured step and returns what `worker` wrote. What the script
    prints goes to standard error. Raises ConfigError where it cannot be started, TrainingError
    where it fails or ends before any captured step, BackendUnavailableError where the device is
    missing, TraceError for a record that cannot be read or written."""
    if request.script and not Path(request.script).is_file():
        raise ConfigError(f"verdict: {request.script}: no such file; pass a script after --")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        words = [sys.executable, "-m", "glm_core.verdict.worker", str(path)]
        request = dataclasses.replace(request, run=next(_RUNS))
        words.append(json.dumps(dataclasses.asdict(request)))
        code = process(words)
        text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
        result: dict[str, Any] = json.loads(text)
    if "error" in result:
        raise ERRORS.get(result["kind"], TrainingError)(result["error"])
    if "report" in result or (request.control and "curve" in result):
        return result
    raise TrainingError(f"verdict: {request.script} {_end(code)}")


def process(words: list[str]) -> int:
    """Runs the script's process and returns how it ended. A SIGTERM ends it too: a launcher sends
    that, and the script would wait for the other ranks of its job. Raises SystemExit then."""
    ended: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def end(number: int, frame: object) -> None:
        ended.append(number)
        if child is not None:
            child.kill()

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, end) if in_main else None
    try:
        child = subprocess.Popen(words, stdout=sys.stderr)
        if ended:
            child.kill()
        code = child.wait()
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)
    if ended:
        raise SystemExit(128 + ended[0])
    return code


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
