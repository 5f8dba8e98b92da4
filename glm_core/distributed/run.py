"""A whole training run under a plan: `glm-core train --plan`, started once per process by
torchrun or `glm-core launch`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.config import RunConfig
from glm_core.diagnose import device_errors
from glm_core.distributed import mesh, saving, straggler
from glm_core.distributed.checkpoint import Checkpoints, complete_checkpoints, find_checkpoint
from glm_core.distributed.engine import Engine
from glm_core.distributed.plan import Plan
from glm_core.distributed.watch import watched
from glm_core.errors import ConfigError, GlmCoreError
from glm_core.session import Session
from glm_core.training import checkpoint
from glm_core.training.interrupt import stop_requests
from glm_core.training.live import Live, memory_peak_bytes
from glm_core.training.loop import Result, Saves, StepResult, loop, way_out
from glm_core.training.metrics import Metrics
from glm_core.training.trainer import Sampler, global_batch

WATCH = "watch"
"""folder of a run that holds every rank's record and times"""
TIMED_EVERY = 50
"""steps; the ranks' times of these, and of the last, are compared"""


def run(
    config: RunConfig,
    plan: Plan,
    out_dir: str | Path,
    *,
    resume: bool = False,
    sampler: Sampler | None = None,
    cache_dir: str = ".cache",
    tensorboard: bool = False,
    live: Live | None = None,
    timeout_s: float = 600.0,
) -> Result:
    """Trains to the last step; every process calls it alike and returns the same but for its own
    fallbacks. `out_dir`, which all hosts must see, gets what `train.run` writes, its checkpoints in
    torch.distributed.checkpoint's form, which any plan can resume, and `stragglers.json`. The
    plan's micro_batches decide, not train.micro_batch. resume: from step 0 where there is no
    checkpoint yet. live: of rank 0. timeout_s: a step that takes longer ends the job and names the
    rank that holds it up (0: never). Raises GlmCoreError."""
    out = Path(out_dir)
    if config.train.compile:
        raise ConfigError(
            "train --plan: does not go with train.compile=true, which is not proved under plans; "
            "leave it out"
        )
    backend = registry.usable(config.train.backend)
    device = mesh.start(backend, timeout_s or 600.0)
    try:
        start = _starting_point(out, resume)
        with (
            way_out(out, lambda: newest(out / checkpoint.FOLDER)),
            watched(out / WATCH, dist.get_rank(), dist.get_world_size(), timeout_s),
            registry.use(backend, strict=config.train.strict) as session,
        ):
            with device_errors.explained(backend.name, "start"):
                made = mesh.make(plan, device.type, timeout_s or None)
                if sampler is None:
                    sampler = _open_data(config, cache_dir)
                engine = Engine(config, plan, made, device)
                job = Job(engine, sampler, backend, out, start, timeout_s or 600.0)
            return job.train(session, tensorboard, live)
    finally:
        dist.destroy_process_group()


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder."""
    return find_checkpoint(folder) if complete_checkpoints(folder) else None


def _starting_point(out: Path, resume: bool) -> Path | None:
    """`checkpoint.starting_point` as rank 0 finds it, for all, before any process writes."""
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            told = [checkpoint.starting_point(out, resume, newest, begin=True)]
        except GlmCoreError as error:
            told = [error]
    dist.broadcast_object_list(told)
    if isinstance(told[0], GlmCoreError):
        raise told[0]
    start: Path | None = told[0]
    return start


def _open_data(config: RunConfig, cache_dir: str) -> Sampler:
    """The whole job's sequences, on every process; rank 0 fills the cache first."""
    from glm_core.data.open import open_sampler

    def opened() -> Sampler:
        return open_sampler(
            config.data, config.train.seed, cache_dir, positions=config.model.positions
        )

    if dist.get_rank() != 0:
        dist.barrier()
        return opened()
    made = opened()
    dist.barrier()
    return made


class Job:
    """One process's run: engine, data, checkpoints; rank 0 tells."""

    def __init__(
        self,
        engine: Engine,
        sampler: Sampler,
        backend: Backend,
        out: Path,
        start: Path | None,
        timeout_s: float,
    ) -> None:
        self.engine, self.sampler, self.backend = engine, sampler, backend
        self.config, self.out, self.start = engine.config, out, start
        self.checkpoints = Checkpoints(out / checkpoint.FOLDER, self.config.train.keep, timeout_s)
        self.memory_peak_bytes = 0
        """of the rank that has most, at the last step's begin"""
        self.timed = 0
        """step whose times are not compared yet"""
        self.metrics: Metrics | None = None
        if start is not None:
            self.restore(start)
        self.stragglers = straggler.StragglerLog(out / "stragglers.json", engine.steps_done)

    @property
    def steps_done(self) -> int:
        return self.engine.steps_done

    def restore(self, path: Path) -> None:
        """Goes on where the checkpoint was taken, under whatever plan."""
        self.sampler.restore(saving.restore(self.engine, self.checkpoints, path))

    def roll_back(self, path: Path) -> None:
        """As `Trainer.roll_back`."""
        data = self.sampler.state()
        self.restore(path)
        self.sampler.restore(data)

    def save(self) -> Path:
        """Begins a checkpoint of now."""
        return saving.save(self.engine, self.checkpoints, self.sampler.state())

    def latest(self) -> Path | None:
        """The newest checkpoint, once it is whole."""
        self.checkpoints.wait()
        return newest(self.checkpoints.folder)

    def step(self) -> StepResult:
        """The next global batch."""
        t, number = self.config.train, self.steps_done + 1
        timed = number % TIMED_EVERY == 0 or number == t.steps
        device_type = self.engine.device.type
        with (
            device_errors.explained(self.backend.name, f"step {number}"),
            straggler.timed(self.out / WATCH, number, device_type, every=int(timed)),
        ):
            batch = self.sampler.next(global_batch(t, self.engine.samples_seen))
            result = self.engine.train_step(batch)
        self.timed = number if timed else 0
        return result

    def asked(self, requests: Sequence[int]) -> bool:
        """A signal reaches processes at different steps; they stop after the same one."""
        mine = [float(bool(requests)), float(memory_peak_bytes(self.backend))]
        most = torch.tensor(mine, device=self.engine.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        self.memory_peak_bytes = int(most[1])
        self.compare()
        return bool(most[0])

    def compare(self) -> None:
        """Lays the ranks' times side by side, where a step was timed and all have met since."""
        step, self.timed = self.timed, 0
        if not step or self.metrics is None:
            return
        report = straggler.report(self.out / WATCH, step, dist.get_world_size())
        if report is not None:
            self.stragglers.add(report)
            self.metrics.ranks(step, report.figures())

    def train(self, session: Session, tensorboard: bool, live: Live | None) -> Result:
        """To the last step, or to the step in which any process is asked to stop."""
        with ExitStack() as stack:
            requests = stack.enter_context(stop_requests())
            if dist.get_rank() == 0:
                self.metrics = stack.enter_context(closing(self._metrics(tensorboard, live)))
            saves = Saves(save=self.save, latest=self.latest, start=self.start)
            result = loop(self, saves, self.metrics, session, lambda: self.asked(requests))
            self.checkpoints.wait()
            self.compare()
        if dist.get_rank() == 0 and (text := self.stragglers.text()):
            print(text, file=sys.stderr)
        return result

    def _metrics(self, tensorboard: bool, live: Live | None) -> Metrics:
        self.out.mkdir(parents=True, exist_ok=True)
        checkpoint.describe(self.out, self.config, self.sampler)
        if live is not None:
            live.memory = lambda: self.memory_peak_bytes
        return Metrics(self.out, self.steps_done, tensorboard, live)
