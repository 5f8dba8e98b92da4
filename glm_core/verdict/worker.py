"""The process that runs a script of the user's under the watch: `python -m glm_core.verdict.worker
RESULT REQUEST`."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from glm_core.errors import BackendUnavailableError, ConfigError, GlmCoreError, TrainingError
from glm_core.verdict.script import Request
from glm_core.verdict.watching import watch


class Complete(BaseException):
    """The last captured step is complete: the script need not run on. No `except Exception` of the
    script catches it."""


class WatchedScript(watch):
    """Writes the verdict after each captured step, because a script may end its process."""

    def __init__(self, request: Request, result: Path) -> None:
        super().__init__(
            steps=request.steps,
            false_alarm_rate=request.false_alarm_rate,
            program=os.path.basename(request.script),
        )
        self.request, self.result = request, result

    def _stop(self) -> None:
        captured = self._begin is not None
        super()._stop()
        if captured and self.docket.calls:
            report = self.report(self.request.context).to_json()
            write(self.result, {"report": report})

    def _start_or_not(self) -> None:
        if self.done >= self.steps[-1]:
            raise Complete
        super()._start_or_not()


def write(path: Path, value: dict[str, Any]) -> None:
    """Writes the result, replacing an older one only once the new one is complete."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value), encoding="utf-8")
    os.replace(unfinished, path)


def context(name: str) -> AbstractContextManager[Any]:
    """Returns the context manager MODULE:CONTEXT, called where it is a function. Raises
    ConfigError."""
    if not name:
        return nullcontext()
    module, _, path = name.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for part in path.split("."):
            value = getattr(value, part)
        value = value() if callable(value) else value
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"verdict: --with {name}: {error}; pass MODULE:CONTEXT, such as flag_gems:use_gems"
        ) from None
    if not hasattr(value, "__enter__"):
        raise ConfigError(f"verdict: --with {name}: this is no context manager; pass one")
    return value


def use_device(name: str) -> None:
    """Makes a device torch's default. Raises BackendUnavailableError."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise BackendUnavailableError(
            f"verdict: --on {name}: {first}; leave --on out to judge the script where it runs"
        ) from None
    torch.set_default_device(name)


def run(request: Request, result: Path) -> None:
    """Runs the script under the watch. Raises GlmCoreError."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(request.script)))
    sys.argv = [request.script, *request.args]
    manager = context(request.context)
    if request.device:
        use_device(request.device)
    watched = WatchedScript(request, result)
    try:
        with manager, watched:
            runpy.run_path(request.script, run_name="__main__")
    except Complete:
        return
    except SystemExit as end:
        if end.code not in (None, 0):
            raise TrainingError(
                f"verdict: {_name(request, watched)} exited: {end.code}; "
                "run it alone until it works"
            ) from None
    except Exception as error:
        traceback.print_exc()
        raise TrainingError(
            f"verdict: {_name(request, watched)} failed: {type(error).__name__}: {error}; its "
            "traceback is above; run it alone until it works"
        ) from None
    watched.report()  # raises where nothing was captured


def _name(request: Request, watched: watch) -> str:
    return f"{request.script}, after {watched.done} optimizer steps,"


def main() -> None:
    """Runs the request and leaves its result or its error."""
    result = Path(sys.argv[1])
    request = Request(**json.loads(sys.argv[2]))
    try:
        run(request, result)
    except GlmCoreError as error:
        write(result, {"error": str(error), "kind": type(error).__name__})


if __name__ == "__main__":
    main()
