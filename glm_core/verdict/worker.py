"""The process that runs a script of the user's under the watch: `python -m glm_core.verdict.worker
RESULT REQUEST`."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from glm_core.distributed.reports import keys_apart
from glm_core.errors import (
    BackendUnavailableError,
    ConfigError,
    GlmCoreError,
    TrainingError,
    in_one_line,
)
from glm_core.verdict import ranks
from glm_core.verdict.against import compare
from glm_core.verdict.curve import Curve
from glm_core.verdict.record import Record, Recorder, read
from glm_core.verdict.script import Request
from glm_core.verdict.watching import watch

NEVER = 1 << 60
"""the number of a step that no program reaches"""


class Complete(BaseException):
    """The last captured step is complete: the script need not run on. No `except Exception` of the
    script catches it."""


class WatchedScript(watch):
    """Writes the verdict after each captured step, because a script may end its process. `record`
    is another machine's, whose calls are computed again after the last captured step."""

    def __init__(self, request: Request, result: Path, record: Record | None = None) -> None:
        parts = 1 + bool(record) + bool(request.curve_steps)
        self.rate = request.false_alarm_rate / parts  # one for the whole run
        super().__init__(
            steps=[NEVER] if request.control else request.steps,
            false_alarm_rate=self.rate,
            program=os.path.basename(request.script),
        )
        self.request, self.path, self.record = request, result, record
        self.curve = Curve(request.control, request.unit) if request.curve_steps else None
        self.last = max(request.curve_steps, 0 if request.control else self.steps[-1])
        self.result: dict[str, Any] = {}
        self.failure: GlmCoreError | None = None
        self.finished = False
        if request.record:
            self.mode.recorder = Recorder()

    def __enter__(self) -> watch:
        if self.curve is not None:
            self._followed = self.curve.followed()
            self._followed.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self.finished |= error[0] is not None  # a script that failed leaves no record
        super().__exit__(*error)
        if self.curve is not None:
            self._followed.__exit__(None, None, None)

    def _stop(self) -> None:
        captured = self._begin is not None
        super()._stop()
        if captured and self.docket.calls:
            self.result["report"] = self.report(self.request.context).to_json()
            self.result["unit"] = self.mode.unit
            if self.mode.step >= self.steps[-1]:
                self.finish()
            write(self.path, self.result)

    def finish(self) -> None:
        """Judges the record's calls and writes an own record, once."""
        if self.finished or not self.docket.calls:
            return
        self.finished = True
        try:
            if self.mode.recorder is not None:
                report = self.report(self.request.context)
                self.mode.recorder.save(Path(self.request.record), report)
            if self.record is not None:
                comparison = compare(self.record, self._device(), self._share_of(self.rate))
                self.result["comparison"] = comparison.to_json()
        except GlmCoreError as error:
            self.failure = error
            raise Complete from None

    def share(self) -> None:
        """Gives rank 0 of a job what this rank found; the others leave the verdict to it."""
        if self.job is None or self.job.world == 1:
            return
        whole = ranks.of_job(self.job, self.result)
        self.result |= {"elsewhere": True} if whole is None else whole
        self.result["ranks"] = self.job.world
        write(self.path, self.result)

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        super()._before(optimizer, args, kwargs)
        if self.curve is not None and optimizer is self.optimizer:
            self.curve.begin_step(optimizer)

    def _device(self) -> str:
        others = sorted(self.docket.devices - {"cpu"})
        return self.request.device or (others[0] if others else "cpu")

    def _start_or_not(self) -> None:
        if self.curve is not None and self.done > len(self.curve.loss):
            self.curve.end_step(self.optimizer)
            self.result["curve"] = self.curve.to_json()
            write(self.path, self.result)
        if self.done >= self.last:
            self.share()
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
    with _explained(name):
        value: Any = importlib.import_module(module)
        for part in path.split("."):
            value = getattr(value, part)
        value = value() if callable(value) else value
    if not hasattr(value, "__enter__"):
        raise ConfigError(f"verdict: --with {name}: this is no context manager; pass one")
    return value


@contextmanager
def entered(name: str) -> Iterator[None]:
    """Is inside the context manager MODULE:CONTEXT in the block. Raises ConfigError where it cannot
    be had or entered."""
    manager = context(name)
    with ExitStack() as stack:
        with _explained(name):
            stack.enter_context(manager)
        yield


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Raises ConfigError in one line where a context of the user's raises anything, as a library
    does that finds no device."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"verdict: --with {name}: {in_one_line(error)}; pass MODULE:CONTEXT, such as "
            "flag_gems:use_gems, that can be entered here"
        ) from None


@contextmanager
def on_device(name: str) -> Iterator[None]:
    """Makes a device torch's default in the block; "" changes nothing. Raises
    BackendUnavailableError."""
    if not name:
        yield
        return
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise BackendUnavailableError(
            f"verdict: --on {name}: {first}; leave --on out to judge the script where it runs"
        ) from None
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


def run(request: Request, result: Path) -> None:
    """Runs the script under the watch. Raises GlmCoreError."""
    record = read(request.against) if request.against else None
    if record is not None and not request.script:
        compare_alone(request, record, result)
        return
    sys.path.insert(0, os.path.dirname(os.path.abspath(request.script)))
    sys.argv = [request.script, *request.args]
    if record is not None and record.curve:
        steps = len(record.curve["reference"]["loss"])
        request = dataclasses.replace(request, curve_steps=steps)
    watched = WatchedScript(request, result, record)
    watched.result["recorded_curve"] = record.curve if record is not None else {}
    try:
        with (
            on_device(request.device),
            keys_apart(request.run),
            entered(request.context),
            watched,
        ):
            _run(request, watched)
            watched.finish()
            watched.share()
    except Complete:
        if watched.failure is not None:
            raise watched.failure from None
        return
    if not request.control:
        watched.report()  # raises where nothing was captured
        write(result, watched.result)


def compare_alone(request: Request, record: Record, result: Path) -> None:
    """Computes the calls of a record again, without a script."""
    with on_device(request.device), entered(request.context):
        compared = compare(record, request.device or "cpu", request.false_alarm_rate)
    write(result, {"report": record.report.to_json(), "comparison": compared.to_json()})


def _run(request: Request, watched: WatchedScript) -> None:
    try:
        runpy.run_path(request.script, run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise TrainingError(
                f"verdict: {_name(request, watched)} exited: {end.code}; "
                "run it alone until it works"
            ) from None
    except Exception as error:
        traceback.print_exc()
        raise TrainingError(
            f"verdict: {_name(request, watched)} failed: {in_one_line(error)}; its traceback is "
            "above; run it alone until it works"
        ) from None


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
    except KeyboardInterrupt:  # the command that started this process says so
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
