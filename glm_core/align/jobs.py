"""Compares every backend with the reference in every dtype (`align run`): one job per dtype, in
processes of their own where possible. Traces and verdicts are kept."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm_core import errors
from glm_core.align import NUM_CONTROLS
from glm_core.align.calibration import calibrate, captured_steps, gradient_modes, open_data
from glm_core.align.controls import (
    Control,
    MakeSampler,
    Progress,
    check_controls,
    train_control,
    with_controls,
)
from glm_core.align.explanation import headline
from glm_core.align.processes import run_in_parallel
from glm_core.align.recording import record
from glm_core.align.trace import Trace, load
from glm_core.align.verdict import FALSE_ALARM_RATE, Pair, Verdict, compare
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.config import Dtype, RunConfig, from_dict, to_dict
from glm_core.diagnose import watchdog
from glm_core.distributed.plan import parse, require_fit
from glm_core.errors import ConfigError
from glm_core.training.parallel import require_exact

WAY_OUT = "reset the device; glm-core align bisect waits for every call and names the op"
"""what a message about a step that takes too long advises"""
REFERENCE = "reference"
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
    if not chosen and not plans:
        raise ConfigError(
            "align: the reference alone leaves nothing to judge; name another backend or a plan"
        )
    configs = [with_dtype(config, dtype) for dtype in dtypes]
    check(configs, list(chosen.values()), controls, without)
    check_plans(config, backends, plans)
    jobs = [
        Job(
            of_dtype,
            list(chosen.values()),
            out,
            0 if "curve" in without else controls,
            list(without),
            [[str(backend), plan] for plan in dict.fromkeys(plans) for backend in backends],
            capture_steps,
            cache_dir,
            timeout_s,
        )
        for of_dtype in configs
    ]
    report = WholeRun(progress or (lambda what, done, of: None), sum(job.steps for job in jobs))
    if len(jobs) > 1 and sampler is None and all(isinstance(b, str) for b in chosen.values()):
        controls_run = run_in_parallel(jobs, report)
    else:
        controls_run = [job.run_alone(sampler, report) for job in jobs]
    recorded = [job.finish(of_job) for job, of_job in zip(jobs, controls_run, strict=True)]
    pairs = [
        compare(reference, candidate, false_alarm_rate=false_alarm_rate)
        for reference, *candidates in (list(traces.values()) for traces in recorded)
        for candidate in candidates
    ]
    traces = {name: trace for of_job in recorded for name, trace in of_job.items()}
    return RunResult(pairs=pairs, traces=traces, out_dir=out, seconds=time.perf_counter() - begin)


def with_dtype(config: RunConfig, dtype: Dtype) -> RunConfig:
    """Returns the config with this working dtype."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, dtype=dtype))


def check(
    configs: Sequence[RunConfig],
    backends: Sequence[str | Backend],
    controls: int,
    without: Sequence[str],
) -> None:
    """Raises BackendUnavailableError or ConfigError for what cannot end in a verdict."""
    for backend in backends:
        usable = registry.usable(backend) if isinstance(backend, str) else backend
        for config in configs:
            registry.require_dtype(usable, config.train.dtype)
            require_exact(config, usable)
    if strange := [part for part in without if part not in PARTS]:
        raise ConfigError(errors.unknown("part", strange[0], PARTS))
    if set(without) == set(PARTS):
        raise ConfigError(
            f"align: without {' and '.join(PARTS)} nothing is judged; leave out one of them at most"
        )
    if "curve" not in without:
        check_controls(controls or 1)


def check_plans(config: RunConfig, backends: Sequence[str | Backend], plans: Sequence[str]) -> None:
    """Raises ConfigError for a plan that the model or a step's batch does not fit, for what no plan
    trains with, and for a backend that other processes cannot find by its name."""
    t = config.train
    for text in plans:
        plan = parse(text)
        batches = range(t.ramp_from, t.global_batch, t.ramp_increment) if t.ramp_from else ()
        for batch in (*batches, t.global_batch):
            length = config.data.length
            require_fit(plan, config.model, world=plan.world, global_batch=batch, length=length)
    for option in ("exact", "compile", "graph"):
        if plans and getattr(t, option):
            raise ConfigError(
                f"align under a plan: train.{option}=true is not judged under plans; leave it out"
            )
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
        captured steps' honest variations, and the candidates, whose steps have a weight."""
        candidates = len(self.backends) * self.weight + len(self.plans)
        curves = 1 + self.controls + (0 if "curve" in self.without else candidates)
        captured = len(self.captured) * (len(gradient_modes(self.config)) + candidates)
        return curves * self.config.train.steps + captured

    @property
    def weight(self) -> int:
        """Returns how many steps a candidate's step counts for: where it is watched, the reference
        computes every call again."""
        return 1 if self.without else 2

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

    def of_dtype(self, progress: Progress) -> Progress:
        """Returns a progress whose parts name the dtype."""
        dtype = self.config.train.dtype
        return lambda what, done, of: progress(f"{dtype}: {what}", done, of)

    def run_alone(self, sampler: MakeSampler | None, progress: Progress) -> list[Control]:
        """Does the whole job in this process; returns its controls."""
        make = sampler or open_data(self.config, self.cache_dir)
        self.run(make, progress)
        return [self.train_control(k, make, progress) for k in range(self.controls)]

    def train_control(self, number: int, sampler: MakeSampler, progress: Progress) -> Control:
        """Trains one of the controls."""
        report = self.of_dtype(progress)
        return train_control(self.config, number, self.controls, sampler, report)

    def finish(self, controls: Sequence[Control]) -> dict[str, Trace]:
        """Saves the reference's trace with its controls. Returns all traces by name."""
        file = path(self.out_dir, self.names[0])
        with_controls(load(file), self.config, controls).save(file)
        return {name: load(path(self.out_dir, name)) for name in self.names}

    def run(self, sampler: MakeSampler, progress: Progress) -> None:
        """Records and saves every trace; the reference's has no controls yet."""
        report = self.of_dtype(progress)
        cal = calibrate(
            self.config,
            sampler=sampler,
            controls=0,
            capture_steps=self.captured,
            judges_ops=bool(self.backends),
            progress=report,
        )
        cal.reference.save(path(self.out_dir, self.names[0]))
        free, taught = "curve" not in self.without, "ops" not in self.without

        def weighted(what: str, done: int, of: int) -> None:
            report(what, done * self.weight, of * self.weight)

        names = iter(self.names[1:])
        for backend, name in zip(self.backends, names, strict=False):
            with watchdog.guard(self.timeout_s, f"align: backend {name_of(backend)}", WAY_OUT):
                trace = record(
                    self.config,
                    backend,
                    calibration=cal,
                    free_run=free,
                    teacher_forcing=taught,
                    progress=weighted,
                )
            trace.save(path(self.out_dir, name))
        for (backend, plan), name in zip(self.plans, names, strict=True):
            from glm_core.align.planned_run import record_plan  # loads torch's compiler

            steps = len(self.captured) + (self.config.train.steps if free else 0)
            report(f"{backend} under {plan}", 0, steps)
            trace = record_plan(
                cal,
                backend,
                plan,
                free_run=free,
                teacher_forcing=taught,
                timeout_s=self.timeout_s,
            )
            trace.save(path(self.out_dir, name))
            report(f"{backend} under {plan}", steps, steps)

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


def name_of(backend: str | Backend) -> str:
    """Returns the name a backend is reported under."""
    return backend if isinstance(backend, str) else backend.name


def path(out_dir: Path, name: str) -> Path:
    """Returns the file of the trace of this name. Characters that a file name cannot have become
    `-`."""
    return out_dir / (re.sub(r"[^\w.-]", "-", name) + ".trace")
