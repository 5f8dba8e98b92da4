"""A whole training run under a plan: `glm-core train --plan`, started once per process by
torchrun or `glm-core launch`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from glm_core.backends import registry
from glm_core.config import RunConfig
from glm_core.diagnose import device_errors
from glm_core.distributed import mesh, straggler
from glm_core.distributed.apply import Source
from glm_core.distributed.checkpoint import Checkpoints, newest_checkpoint
from glm_core.distributed.exact import ExactProcesses
from glm_core.distributed.parallel import ManyProcesses
from glm_core.distributed.plan import Plan
from glm_core.distributed.watch import watched
from glm_core.errors import ConfigError, GlmCoreError
from glm_core.session import Session
from glm_core.training import checkpoint
from glm_core.training.batches import Sampler
from glm_core.training.interrupt import stop_requests
from glm_core.training.live import Live, memory_peak_bytes
from glm_core.training.loop import Result, loop
from glm_core.training.parallel import require_exact
from glm_core.training.run import remedies, reporting
from glm_core.training.trainer import Trainer

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
    weights: Source | None = None,
) -> Result:
    """Trains to the last step; every process calls it alike and returns the same but for its own
    fallbacks. `out_dir`, which all hosts must see, gets what `training.run.run` writes, its
    checkpoints in torch.distributed.checkpoint's form, which any plan can resume, and
    `stragglers.json`. The plan's micro_batches decide, not train.micro_batch. resume: from step 0
    where there is no checkpoint yet. live: of rank 0. timeout_s: a step that takes longer ends the
    job and names the rank that holds it up (0: never). weights: to start from; by
    default random ones. Raises GlmCoreError."""
    out, t = Path(out_dir), config.train
    if chosen := [option for option in ("compile", "graph") if getattr(t, option)]:
        raise ConfigError(
            f"train --plan: cannot be combined with train.{chosen[0]}=true, which is not proved "
            "under plans; leave it out"
        )
    backend = registry.usable(t.backend)
    require_exact(config, backend, plan=True)
    device = mesh.start(backend, timeout_s or 600.0)
    try:
        start = _starting_point(out, resume)
        folder = out / checkpoint.FOLDER
        with (
            remedies(out, lambda: newest_checkpoint(folder)),
            watched(out / WATCH, dist.get_rank(), dist.get_world_size(), timeout_s),
            registry.use(backend, strict=t.strict, exact=t.exact) as session,
        ):
            with device_errors.explained(backend.name, "start"):
                axes = mesh.make(plan, device.type, timeout_s or None)
                if sampler is None:
                    sampler = _open_data(config, cache_dir)
                kind = ExactProcesses if t.exact else ManyProcesses
                parallel = kind(config, plan, axes, backend, device, timeout_s or None, weights)
                checkpoints = Checkpoints(folder, t.keep, timeout_s or 600.0)
                trainer = Trainer(config, sampler, parallel, checkpoints)
                if start is not None:
                    trainer.restore(checkpoints.open(start))
            return _train(trainer, session, out, start, tensorboard, live)
    finally:
        mesh.leave()


def _train(
    trainer: Trainer,
    session: Session,
    out: Path,
    start: Path | None,
    tensorboard: bool,
    live: Live | None,
) -> Result:
    """Trains to the last step, or to the step in which any process is asked to stop."""
    assert trainer.checkpoints is not None
    meeting = Meeting(trainer, out)
    trainer.timed = meeting.timed
    is_reporter = trainer.parallel.is_reporter
    if live is not None:
        live.memory = lambda: meeting.memory_peak_bytes
    with (
        stop_requests() as requests,
        reporting(trainer, out, tensorboard, live) if is_reporter else nullcontext(),
    ):
        result = loop(trainer, session, lambda: meeting.stop(bool(requests)), start)
        trainer.checkpoints.wait()
        meeting.compare_times()
    if is_reporter and (summary := meeting.stragglers.text()):
        print(summary, file=sys.stderr)
    return result


class Meeting:
    """What the processes of a run settle between two steps: whether all stop, the most memory that
    any of them uses, and which one was slow in a timed step."""

    def __init__(self, trainer: Trainer, out: Path) -> None:
        self.trainer, self.out = trainer, out
        self.memory_peak_bytes = 0
        """of the rank that has most, when the last step began"""
        self.stragglers = straggler.StragglerLog(out / "stragglers.json", trainer.steps_done)
        self._timed_step = 0
        """whose times are not compared yet; 0: none"""

    @contextmanager
    def timed(self, step: int) -> Iterator[None]:
        """Times the block where the step is one of those whose times are compared."""
        timed = step % TIMED_EVERY == 0 or step == self.trainer.config.train.steps
        device_type = self.trainer.device.type
        with straggler.timed(self.out / WATCH, step, device_type, every=int(timed)):
            yield
        self._timed_step = step if timed else 0

    def stop(self, requested: bool) -> bool:
        """Whether any process is asked to stop: a signal reaches them at different steps, and they
        stop after the same one. A collective."""
        mine = [float(requested), float(memory_peak_bytes(self.trainer.backend))]
        most = torch.tensor(mine, device=self.trainer.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        self.memory_peak_bytes = int(most[1])
        self.compare_times()
        return bool(most[0])

    def compare_times(self) -> None:
        """Compares the ranks' times of the last step if it was timed; all must have met since."""
        step, self._timed_step = self._timed_step, 0
        if not step or self.trainer.metrics is None:
            return
        report = straggler.report(self.out / WATCH, step, dist.get_world_size())
        if report is not None:
            self.stragglers.add(report)
            self.trainer.metrics.ranks(step, report.figures())


def _starting_point(out: Path, resume: bool) -> Path | None:
    """Returns `checkpoint.starting_point` as rank 0 finds it, before any process writes."""
    message: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            message = [checkpoint.starting_point(out, resume, newest_checkpoint, begin=True)]
        except GlmCoreError as error:
            message = [error]
    dist.broadcast_object_list(message)
    if isinstance(message[0], GlmCoreError):
        raise message[0]
    start: Path | None = message[0]
    return start


def _open_data(config: RunConfig, cache_dir: str) -> Sampler:
    """Opens the whole job's sequences on every process; rank 0 fills the cache first."""
    from glm_core.data.open import open_sampler

    def opened() -> Sampler:
        return open_sampler(
            config.data, config.train.seed, cache_dir, positions=config.model.positions
        )

    if dist.get_rank() != 0:
        dist.barrier()
        return opened()
    sampler = opened()
    dist.barrier()
    return sampler
