"""A whole training run under a plan: `glm-core train --plan`, started once per process by
torchrun or `glm-core launch`."""

from __future__ import annotations

import dataclasses
import time
from contextlib import ExitStack, closing
from pathlib import Path

import torch.distributed as dist

from glm_core import checkpoint, failure, watchdog
from glm_core.backends import registry
from glm_core.config import RunConfig
from glm_core.distributed import mesh, saving
from glm_core.distributed.checkpoint import Checkpoints
from glm_core.distributed.checkpoint import find as find_checkpoint
from glm_core.distributed.engine import Engine
from glm_core.distributed.plan import Plan
from glm_core.distributed.precision import any_rank
from glm_core.distributed.watch import watched
from glm_core.errors import ConfigError
from glm_core.interrupt import stop_requests
from glm_core.metrics import Metrics, Progress
from glm_core.session import Session
from glm_core.train import Result, Sampler, global_batch


def run(
    config: RunConfig,
    plan: Plan,
    out_dir: str | Path,
    *,
    resume: bool = False,
    sampler: Sampler | None = None,
    cache_dir: str = ".cache",
    timeout_s: float = 600.0,
) -> Result:
    """Trains to the last step; every process calls it alike and returns the same but for its own
    fallbacks. `out_dir`, which all hosts must see, gets what `train.run` writes, its checkpoints in
    torch.distributed.checkpoint's form, which any plan can resume. The plan's micro_batches decide,
    not train.micro_batch. timeout_s: a step that takes longer ends the job and names the rank that
    holds it up (0: never). Raises GlmCoreError."""
    out = Path(out_dir)
    _require_known(config)
    backend = registry.usable(config.train.backend)
    device = mesh.start(backend, timeout_s or 600.0)
    try:
        start = _starting_point(out, resume)
        with (
            watched(out / "watch", dist.get_rank(), dist.get_world_size(), timeout_s),
            registry.use(backend, strict=config.train.strict) as session,
            failure.explained(backend.name, "start"),
        ):
            made = mesh.make(plan, device.type, timeout_s or None)
            if sampler is None:
                sampler = _open_data(config, cache_dir)
            engine = Engine(config, plan, made, device)
            saves = Checkpoints(out / checkpoint.FOLDER, config.train.keep, timeout_s or 600.0)
            job = Job(engine, sampler, saves, out)
            if start is not None:
                job.restore(start)
            return job.train(session)
    finally:
        dist.destroy_process_group()


def _require_known(config: RunConfig) -> None:
    """Raises ConfigError for what one process does and a plan does not, rather than leave it out
    silently."""
    policy = config.policy
    wrong = {
        "train.compile=true": config.train.compile,
        f"policy.nonfinite={policy.nonfinite}": policy.nonfinite != "stop",
        f"policy.spike={policy.spike}": policy.spike != "off",
    }
    if told := [key for key, there in wrong.items() if there]:
        raise ConfigError(f"train --plan: does not go with {', '.join(told)}; leave it out")


def _starting_point(out: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, None for a start from step 0; decided before any process
    writes. Raises ConfigError rather than write over another run."""
    begun = (out / "config.toml").exists()
    start = None
    if resume and (out / checkpoint.FOLDER).is_dir():
        start = find_checkpoint(out / checkpoint.FOLDER)
    dist.barrier()
    if begun and not resume:
        raise ConfigError(f"{out}: holds a run already; resume it or choose another folder")
    return start


def _open_data(config: RunConfig, cache_dir: str) -> Sampler:
    """The whole job's sequences, on every process; rank 0 fills the cache first."""
    from glm_core import data

    def opened() -> Sampler:
        return data.open(
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

    def __init__(self, engine: Engine, sampler: Sampler, saves: Checkpoints, out: Path) -> None:
        self.engine, self.sampler, self.saves, self.out = engine, sampler, saves, out
        self.train_config = engine.config.train
        self.samples_seen, self.saved = 0, -1
        self.tells = dist.get_rank() == 0

    def restore(self, path: Path) -> None:
        """Goes on where the checkpoint was taken, under whatever plan."""
        data = saving.restore(self.engine, self.saves, path)
        self.sampler.restore(data["sampler"])
        self.samples_seen, self.saved = data["samples_seen"], self.engine.steps_done

    def save(self) -> None:
        """Begins a checkpoint of now."""
        self.saved = self.engine.steps_done
        watchdog.beat(f"checkpoint of step {self.saved}")
        data = {"sampler": self.sampler.state(), "samples_seen": self.samples_seen}
        saving.save(self.engine, self.saves, data)

    def train(self, session: Session) -> Result:
        """To the last step, or to the step in which any process is asked to stop."""
        t, engine = self.train_config, self.engine
        loss, seconds, tokens = None, 0.0, 0
        with ExitStack() as stack:
            requests = stack.enter_context(stop_requests())
            metrics = self._metrics(stack)
            progress = Progress(t.steps)
            while engine.steps_done < t.steps and not self._any_asked(requests):
                watchdog.beat(f"step {engine.steps_done + 1}")
                begin = time.perf_counter()
                batch = self.sampler.next(global_batch(t, self.samples_seen))
                step = engine.train_step(batch)
                took = time.perf_counter() - begin
                self.samples_seen += len(batch.tokens)
                loss, tokens = step.loss, tokens + batch.tokens.numel()
                seconds += took
                if metrics is not None:
                    facts = dataclasses.asdict(step) | {"step_ms": round(took * 1e3, 3)}
                    metrics.write({**facts, "tokens": batch.tokens.numel()})
                    progress.update(step.step, f"loss {loss:.4f}  lr {step.lr:.2e}")
                if t.save_every and step.step % t.save_every == 0:
                    self.save()
            if self.saved != engine.steps_done:
                self.save()
            path = self.saves.wait()
        return Result(
            steps=engine.steps_done, loss=loss,
            tokens_per_s=tokens / seconds if seconds else 0.0,
            interrupted=engine.steps_done < t.steps, fallbacks=dict(session.fallbacks),
            checkpoint=path or find_checkpoint(self.saves.folder),
        )  # fmt: skip

    def _metrics(self, stack: ExitStack) -> Metrics | None:
        if not self.tells:
            return None
        self.out.mkdir(parents=True, exist_ok=True)
        checkpoint.describe(self.out, self.engine.config, self.sampler)
        return stack.enter_context(closing(Metrics(self.out, self.engine.steps_done)))

    def _any_asked(self, requests: list[int]) -> bool:
        """A signal reaches processes at different steps; they stop after the same one."""
        return any_rank(bool(requests), device=str(self.engine.device))
