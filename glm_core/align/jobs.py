"""Compares every backend with the reference in every dtype (`align run`): one job per dtype, in
processes of their own where possible. Traces and verdicts are kept."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

import torch

import glm_core
from glm_core import errors
from glm_core.align import NUM_CONTROLS
from glm_core.align.calibration import (
    MakeSampler,
    Progress,
    calibrate,
    captured_steps,
    check_controls,
    gradient_modes,
)
from glm_core.align.explanation import headline
from glm_core.align.recording import record
from glm_core.align.trace import Trace, load
from glm_core.align.verdict import FALSE_ALARM_RATE, Pair, Verdict, compare
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.config import Dtype, RunConfig, from_dict, to_dict
from glm_core.diagnose import watchdog
from glm_core.distributed.plan import parse, require_fit
from glm_core.errors import ConfigError

WAY_OUT = "reset the device; glm-core align bisect waits for every call and names the op"
"""what a message about a step that takes too long advises"""
REFERENCE = "reference"
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""environment of the workers: glibc then keeps the memory of large tensors, which it would else
fetch from the system and clear for every op: a seventh of the time"""
PARTS = ("curve", "ops")
"""what `without` may leave out: the curve (the controls, nine tenths of the time), or the captured
steps (gradients, op by op)"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """All verdicts of a run."""

    pairs: list[Pair]
    traces: dict[str, Trace]
    """by file name without suffix: `reference-float32`, `cpu-bfloat16`"""
    out_dir: Path
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """Returns `diverged` where any pair diverged."""
        diverged = any(pair.verdict == "diverged" for pair in self.pairs)
        return "diverged" if diverged else "aligned"

    def trace(self, backend: str, dtype: str) -> Trace:
        """Returns the trace of one backend in one dtype."""
        return self.traces[f"{backend}-{dtype}"]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values; the curves are in the trace files."""
        pairs = [pair.to_json() for pair in self.pairs]
        files = {name: str(path(self.out_dir, name)) for name in self.traces}
        plain = {"verdict": self.verdict, "summary": headline(self.pairs), "pairs": pairs}
        return {**plain, "seconds": self.seconds, "traces": files}


def run(
    config: RunConfig,
    backends: Sequence[str | Backend],
    *,
    out_dir: str | Path,
    dtypes: Sequence[Dtype] | None = None,
    controls: int = NUM_CONTROLS,
    without: Sequence[str] = (),
    plans: Sequence[str] = (),
    capture_steps: Sequence[int] | None = None,
    sampler: MakeSampler | None = None,
    cache_dir: str = ".cache",
    false_alarm_rate: float = FALSE_ALARM_RATE,
    progress: Progress | None = None,
    timeout_s: float = 0.0,
) -> RunResult:
    """Trains `config` on every backend from the same weights, data order and seed, in each of
    `dtypes` (default: the config's), and judges each against the reference, which always runs.
    Traces go to `out_dir`. `without` names the PARTS that are not judged. Under each of `plans`
    (`dp=2,zero=1`) every backend named by a string, the reference too, also trains in processes on
    this host. Several dtypes run in
    parallel processes if all backends are named by strings and the data is the config's. A
    backend's step or op call that takes longer than `timeout_s` ends its process (0: never).
    `progress` counts the steps of the whole run. Raises BackendUnavailableError or ConfigError
    before anything is trained, and DeviceError where a backend's device fails."""
    begin, out = time.perf_counter(), Path(out_dir)
    chosen = {name_of(b): b for b in backends if name_of(b) != REFERENCE}
    dtypes = dtypes or (config.train.dtype,)
    check(list(chosen.values()), dtypes, controls, without)
    check_plans(config, backends, plans)
    jobs = [
        Job(
            dataclasses.replace(config, train=dataclasses.replace(config.train, dtype=dtype)),
            list(chosen.values()),
            out,
            0 if "curve" in without else controls,
            list(without),
            [[str(backend), plan] for plan in plans for backend in backends],
            capture_steps,
            cache_dir,
            timeout_s,
        )
        for dtype in dtypes
    ]
    report = WholeRun(progress or (lambda what, done, of: None), sum(job.steps for job in jobs))
    if len(jobs) > 1 and sampler is None and all(isinstance(b, str) for b in chosen.values()):
        run_in_parallel(jobs, report)
        recorded = [{n: load(path(out, n)) for n in job.names} for job in jobs]
    else:
        recorded = [job.run(sampler, report) for job in jobs]
    pairs = [
        compare(reference, candidate, false_alarm_rate=false_alarm_rate)
        for reference, *candidates in (list(traces.values()) for traces in recorded)
        for candidate in candidates
    ]
    traces = {name: trace for of_job in recorded for name, trace in of_job.items()}
    return RunResult(pairs=pairs, traces=traces, out_dir=out, seconds=time.perf_counter() - begin)


def check(
    backends: Sequence[str | Backend],
    dtypes: Sequence[Dtype],
    controls: int,
    without: Sequence[str],
) -> None:
    """Raises BackendUnavailableError or ConfigError for what cannot end in a verdict."""
    for backend in backends:
        usable = registry.usable(backend) if isinstance(backend, str) else backend
        for dtype in dtypes:
            registry.require_dtype(usable, dtype)
    if strange := [part for part in without if part not in PARTS]:
        raise ConfigError(errors.unknown("part", strange[0], PARTS))
    if set(without) == set(PARTS):
        raise ConfigError(
            f"align: without {' and '.join(PARTS)} nothing is judged; leave out one of them at most"
        )
    if "curve" not in without:
        check_controls(controls or 1)


def check_plans(config: RunConfig, backends: Sequence[str | Backend], plans: Sequence[str]) -> None:
    """Raises ConfigError for a plan that the model or the batch does not fit, or a backend that
    other processes cannot find by its name."""
    for text in plans:
        plan = parse(text)
        batch, length = config.train.global_batch, config.data.length
        require_fit(plan, config.model, world=plan.world, global_batch=batch, length=length)
    if plans and (nameless := [b.name for b in backends if not isinstance(b, str)]):
        raise ConfigError(
            f"align under a plan: backend {nameless[0]} is an object, which other processes cannot "
            "have; register it and pass its name"
        )


class WholeRun:
    """Turns the progress of the parts of a run into the progress of the whole run."""

    def __init__(self, progress: Progress, steps: int) -> None:
        """steps: of all parts together."""
        self.progress, self.steps = progress, steps
        self.done: dict[str, int] = {}

    def __call__(self, what: str, done: int, of: int) -> None:
        """Reports that `done` steps of the part `what` are done."""
        self.done[what] = done
        self.progress(what, sum(self.done.values()), self.steps)


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One dtype of a run: its calibration and all candidates."""

    config: RunConfig
    backends: list[str | Backend]
    out_dir: Path
    controls: int
    without: list[str]
    plans: list[list[str]]
    """backend and plan of each candidate that trains in several processes"""
    capture_steps: Sequence[int] | None
    cache_dir: str
    timeout_s: float

    @property
    def steps(self) -> int:
        """Returns the steps of the parts that report progress: the reference, its controls, the
        captured steps' honest variations, and the candidates."""
        candidates = len(self.backends) + len(self.plans)
        curves = 1 + self.controls + (0 if "curve" in self.without else candidates)
        captured = len(self.captured) * (len(gradient_modes(self.config)) + candidates)
        return curves * self.config.train.steps + captured

    @property
    def captured(self) -> tuple[int, ...]:
        """Returns the steps whose calls and gradients are judged."""
        return () if "ops" in self.without else captured_steps(self.config, self.capture_steps)

    @property
    def names(self) -> list[str]:
        """Returns the names of the traces it writes, the reference's first."""
        dtype = self.config.train.dtype
        planned = (f"{backend} under {plan}" for backend, plan in self.plans)
        return [f"{name}-{dtype}" for name in (REFERENCE, *map(name_of, self.backends), *planned)]

    def run(self, sampler: MakeSampler | None, progress: Progress) -> dict[str, Trace]:
        """Records and saves every trace; returns them by name."""

        def report(what: str, done: int, of: int) -> None:
            progress(f"{self.config.train.dtype}: {what}", done, of)

        cal = calibrate(
            self.config,
            sampler=sampler,
            controls=self.controls,
            cache_dir=self.cache_dir,
            capture_steps=self.captured,
            progress=report,
        )
        traces = {self.names[0]: cal.reference}
        cal.reference.save(path(self.out_dir, self.names[0]))
        free, taught = "curve" not in self.without, "ops" not in self.without
        names = iter(self.names[1:])
        for backend, name in zip(self.backends, names, strict=False):
            with watchdog.guard(self.timeout_s, f"align: backend {name_of(backend)}", WAY_OUT):
                traces[name] = record(
                    self.config,
                    backend,
                    calibration=cal,
                    free_run=free,
                    teacher_forcing=taught,
                    progress=report,
                )
            traces[name].save(path(self.out_dir, name))
        for (backend, plan), name in zip(self.plans, names, strict=True):
            from glm_core.align.planned_run import record_plan  # loads torch's compiler

            steps = len(self.captured) + (self.config.train.steps if free else 0)
            report(f"{backend} under {plan}", 0, steps)
            traces[name] = record_plan(
                cal,
                backend,
                plan,
                free_run=free,
                teacher_forcing=taught,
                timeout_s=self.timeout_s,
            )
            traces[name].save(path(self.out_dir, name))
            report(f"{backend} under {plan}", steps, steps)
        return traces

    def to_json(self) -> str:
        """Returns the job as text for another process. The backends must be names."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain |= {"config": to_dict(self.config), "out_dir": str(self.out_dir)}
        return json.dumps(plain)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Returns the job that `to_json` wrote."""
        plain = json.loads(text)
        plain |= {
            "config": from_dict(RunConfig, plain["config"]),
            "out_dir": Path(plain["out_dir"]),
        }
        return cls(**plain)


def run_in_parallel(jobs: Sequence[Job], progress: Progress) -> None:
    """Runs each job in a process of its own with its share of the threads, because a small model
    keeps only one core busy. Raises the first worker's error."""
    threads = max(1, torch.get_num_threads() // len(jobs))
    root = str(Path(glm_core.__file__).parents[1])
    env = {
        **MALLOC,
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "glm_core.align.worker", str(threads)]
    lines: SimpleQueue[str] = SimpleQueue()
    with ExitStack() as stack:
        running = []
        for job in jobs:
            process = stack.enter_context(
                subprocess.Popen(
                    [*command, job.to_json()], stdout=subprocess.PIPE, text=True, env=env
                )
            )
            stack.callback(process.terminate)  # an error in one ends them all
            reader = threading.Thread(target=_forward, args=(process.stdout, lines), daemon=True)
            reader.start()
            running.append((process, reader))
        while any(reader.is_alive() for _, reader in running) or not lines.empty():
            with suppress(Empty):
                line = json.loads(lines.get(timeout=0.2))
                if "error" in line:
                    raise getattr(errors, line["kind"])(line["error"])
                progress(line["what"], line["done"], line["of"])
        for process, _ in running:
            if process.wait():
                raise errors.TrainingError(
                    f"align: a worker process ended with exit code {process.returncode}; see its "
                    "message above"
                )


def _forward(stream: IO[str], lines: SimpleQueue[str]) -> None:
    for line in stream:
        lines.put(line)


def name_of(backend: str | Backend) -> str:
    """Returns the name a backend is reported under."""
    return backend if isinstance(backend, str) else backend.name


def path(out_dir: Path, name: str) -> Path:
    """Returns the file of the trace of this name. Characters that a file name cannot have become
    `-`."""
    return out_dir / (re.sub(r"[^\w.-]", "-", name) + ".trace")
