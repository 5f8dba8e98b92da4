"""One training run: batches through the model, gradients accumulated, clipped AdamW, everything
reproducible and resumable."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from glm_core import checkpoint, failure, nonfinite, watchdog
from glm_core.backends import registry
from glm_core.config import RunConfig, TrainConfig, to_dict
from glm_core.errors import ConfigError, DeviceError, TrainingError
from glm_core.interrupt import stop_requests
from glm_core.live import Live
from glm_core.metrics import Metrics, Progress
from glm_core.model import GLM
from glm_core.optimizer import LossScale, Optimizer, learning_rate, sum_in_float32
from glm_core.policy import Policy, RollBack
from glm_core.session import Fallback, Session


class Batch(Protocol):
    """What the trainer reads of a batch; shapes in glm_core.data."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def loss_weight(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def key_start(self) -> Tensor: ...
    @property
    def key_end(self) -> Tensor: ...


class Sampler(Protocol):
    """Where batches come from; its state makes a resumed run see the same ones."""

    def next(self, micro_batch: int) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step tells; goes into the metrics and the trace."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    global_batch: int
    loss_scale: float
    skipped: bool


def global_batch(config: TrainConfig, samples_seen: int) -> int:
    """Sequences of the next step: `ramp_from`, growing by `ramp_increment` in equal shares of
    `ramp_samples` (Zeng et al. 2022, appendix B.1)."""
    if not config.ramp_from:
        return config.global_batch
    increments = max(1, (config.global_batch - config.ramp_from) // config.ramp_increment)
    done = samples_seen * increments // max(1, config.ramp_samples)
    return min(config.global_batch, config.ramp_from + done * config.ramp_increment)


class Trainer:
    """Model, optimizer and sampler of one run, advanced by `step()`. The backend must be active
    around `step` (`registry.use`); `run` in this module does both."""

    def __init__(
        self, config: RunConfig, sampler: Sampler, *, weights: dict[str, Tensor] | None = None,
        model: GLM | None = None,
    ) -> None:  # fmt: skip
        """weights: to start from; model: one that has its weights, of which only those that are not
        frozen are trained and saved."""
        self.config, self.sampler = config, sampler
        self.backend = registry.usable(config.train.backend)
        self.device = self.backend.device()
        self.dtype: torch.dtype = getattr(torch, config.train.dtype)
        if self.dtype not in self.backend.dtypes:
            known = ", ".join(str(d).removeprefix("torch.") for d in self.backend.dtypes)
            raise ConfigError(
                f"train.dtype={config.train.dtype}: backend {self.backend.name} computes in "
                f"{known}; use one of these"
            )
        if config.train.compile and hasattr(model, "prefix"):
            raise ConfigError(
                "train.compile=True: a prefix (P-Tuning) moves the mask by its values, which "
                "torch.compile cannot trace; leave compile out"
            )
        self.model = (model or GLM(config.model)).to(self.device, self.dtype)
        self.optimizer = Optimizer(self.model, config.train)
        if model is None:
            self.optimizer.load_masters(initial_weights(config) if weights is None else weights)
        t = config.train
        if t.global_batch > t.micro_batch:
            sum_in_float32(self.model)
        self.loss_scale = LossScale.of(t)
        self.policy = Policy(config.policy)
        self.samples_seen = 0
        self.steps_done = 0
        self.loss: Callable[..., Tensor] = self.model.loss
        if t.compile:
            self.loss = torch.compile(self.model.loss, fullgraph=True)

    def batches(self) -> list[Batch]:
        """The micro-batches of the next step, on the CPU."""
        t = self.config.train
        return [
            self.sampler.next(t.micro_batch)
            for _ in range(global_batch(t, self.samples_seen) // t.micro_batch)
        ]

    def backward(self, batches: list[Batch]) -> Tensor:
        """Forward and backward over the micro-batches; gradients are left in `.grad`, multiplied by
        the loss scale. Returns the loss over the global batch (float32 scalar): the same for every
        split into micro-batches."""
        total = sum(float(b.loss_weight.sum()) for b in batches)
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            weight = batch.loss_weight * (self.loss_scale.scale / total)
            inputs = (
                batch.tokens, batch.positions, batch.key_start, batch.key_end, batch.labels, weight,
            )  # fmt: skip
            part = self.loss(*(x.to(self.device) for x in inputs))
            part.backward()
            loss += part.detach()
        return loss / self.loss_scale.scale

    def step(self) -> StepResult:
        """One optimizer step. A float16 overflow skips the update and lowers the loss scale; any
        other loss or gradient that is not finite, and a spike, is the policy's: TrainingError,
        RollBack or a skipped update, weights untouched. A device that gives up: DeviceError."""
        with failure.explained(self.backend.name, f"step {self.steps_done + 1}"):
            return self._step()

    def _step(self) -> StepResult:
        self.model.train()
        batches = self.batches()
        self.model.zero_grad(set_to_none=True)
        loss = float(self.backward(batches))
        scale, lr = self.loss_scale.scale, learning_rate(self.config.train, self.steps_done + 1)
        spike = self.policy.spike(loss)
        bad = spike or not math.isfinite(loss)
        norm = math.nan if bad else float(self.optimizer.step(lr, scale))
        skipped = not math.isfinite(norm)
        if spike:
            self.policy.decide(self.steps_done + 1, "spike", spike)
        elif not self.loss_scale.explains(skipped, self.config.train.dtype):
            told = self._explain(batches, loss, norm)
            self.policy.decide(self.steps_done + 1, "nonfinite", told)
        self.steps_done += 1
        if not skipped:
            self.policy.good(self.steps_done, loss)
        sequences = sum(len(b.tokens) for b in batches)
        self.samples_seen += sequences
        tokens = sum(b.tokens.numel() for b in batches)
        return StepResult(self.steps_done, loss, norm, lr, tokens, sequences, scale, skipped)

    def _explain(self, batches: list[Batch], loss: float, norm: float) -> str:
        """Runs the failed step's backward again, watched and not compiled, from the same
        weights."""
        compiled, self.loss = self.loss, self.model.loss
        self.model.zero_grad(set_to_none=True)
        with nonfinite.watch(self.model) as seen:
            self.backward(batches)
        self.loss = compiled
        fallback = "op global_norm" if seen.op == seen.parameter == "" else "summing gradients"
        subject = (
            f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        )
        return (
            f"{subject}; first not finite: {seen.op or fallback}; "
            f"first parameter with such a gradient: {seen.parameter or 'none'}; resume from the "
            "last checkpoint with a lower train.lr, or look into that op"
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able facts from which `restore` goes on, bit for bit."""
        optimizer = self.optimizer.state()
        rng = {"rng.torch": torch.get_rng_state(), "rng.backend": self.backend.rng_state()}
        facts = {
            "config": to_dict(self.config),
            "step": self.steps_done,
            "samples_seen": self.samples_seen,
            "optimizer_steps": optimizer["step_count"],
            "loss_scale": dataclasses.asdict(self.loss_scale),
            "sampler": self.sampler.state(),
            "policy": self.policy.state(),
        }
        return {**optimizer["tensors"], **rng}, facts

    def restore(self, path: Path) -> None:
        """Goes on where the checkpoint was taken. Raises CheckpointError, or DataError where the
        text is another."""
        path = checkpoint.find(path)
        tensors, facts = checkpoint.load(path)
        checkpoint.require_same(facts["config"], self.config, path)
        checkpoint.require_fit(tensors, self.state()[0], path)
        self.sampler.restore(facts["sampler"])
        self.optimizer.restore({"tensors": tensors, "step_count": facts["optimizer_steps"]})
        self.loss_scale = LossScale(**facts["loss_scale"])
        self.policy.restore(facts.get("policy", self.policy.state()))  # older ones have none
        self.steps_done, self.samples_seen = facts["step"], facts["samples_seen"]
        self.backend.set_rng_state(tensors["rng.backend"])
        torch.set_rng_state(tensors["rng.torch"])

    def roll_back(self, path: Path) -> None:
        """Weights, optimizer and step of the checkpoint, but the data from where they are now: what
        led to the bad step is passed over (Chowdhery et al. 2022, section 5.1)."""
        data = self.sampler.state()
        self.restore(path)
        self.sampler.restore(data)

    def save(self, folder: Path) -> Path:
        """Writes a checkpoint of now. Raises CheckpointError."""
        return checkpoint.save(folder, self.steps_done, *self.state(), self.config.train.keep)


def initial_weights(config: RunConfig) -> dict[str, Tensor]:
    """The run's float32 starting weights, the same on every backend and device."""
    model = GLM(config.model).init_weights(config.train.seed)
    return {n: p.detach() for n, p in model.named_parameters()}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a run ended."""

    steps: int
    """done in all, those before a resume included"""
    loss: float | None
    """of the last step; None where this call did none"""
    tokens_per_s: float
    """over the steps of this call after its first, batches included, checkpoints not; 0 where there
    are none"""
    interrupted: bool
    """stopped by SIGINT or SIGTERM before the last step"""
    fallbacks: dict[Fallback, int]
    """reference in a kernel's place: calls, or traces where compiled; each with its reason"""
    checkpoint: Path


def run(
    config: RunConfig,
    out_dir: str | Path,
    *,
    resume: bool | str | Path = False,
    sampler: Sampler | None = None,
    model: GLM | None = None,
    cache_dir: str | Path = ".cache",
    tensorboard: bool = False,
    live: Live | None = None,
    timeout_s: float = 0.0,
) -> Result:
    """Trains to the last step. Into `out_dir` go `config.toml` (resolved), `tokenizer.model`,
    `metrics.jsonl`, `checkpoints/` and, if asked, `tensorboard/`; progress goes to stderr.

    resume: True goes on from `out_dir`'s latest checkpoint (from the start if it was stopped before
    the first), a path from that one. sampler: in place of the config's data, which is cached in
    `cache_dir`. model: in place of the config's initial weights; what is frozen in it stays. The
    first Ctrl-C or SIGTERM finishes the step, saves and returns; the second acts at once.
    timeout_s: a step that takes longer ends the process with exit code 1 and a line that says where
    (0: never). Raises GlmCoreError; whatever happens, the newest whole checkpoint stays."""
    out, t = Path(out_dir), config.train
    start = checkpoint.starting_point(out, resume)
    if sampler is None:
        from glm_core import data  # here, so that a run on its own sampler needs no sentencepiece

        sampler = data.open(config.data, t.seed, cache_dir, positions=config.model.positions)
    folder = out / checkpoint.FOLDER
    subject, way_out = f"backend {t.backend}", f"reset the device, then resume from {folder}"
    try:
        with failure.explained(t.backend, "start"):
            trainer = Trainer(config, sampler, model=model)
            if start is not None:
                trainer.restore(start)
        out.mkdir(parents=True, exist_ok=True)
        with (
            watchdog.guard(timeout_s, subject, way_out),
            closing(Metrics(out, trainer.steps_done, tensorboard, live)) as metrics,
            registry.use(trainer.backend, strict=t.strict) as session,
            stop_requests() as requests,
        ):
            checkpoint.describe(out, config, sampler)
            return _loop(trainer, folder, start, metrics, session, requests)
    except DeviceError as error:
        last = f"last checkpoint: {checkpoint.latest(folder) or start or 'none'}"
        raise DeviceError(f"{error}; {last}", **error.place) from error.__cause__
    except OSError as error:
        told = f"{out}: {error}; make it writable or make room, then resume"
        raise TrainingError(told) from error


def _loop(
    trainer: Trainer, folder: Path, saved: Path | None, metrics: Metrics, session: Session,
    requests: list[int],
) -> Result:  # fmt: skip
    start, t, progress = saved, trainer.config.train, Progress(trainer.config.train.steps)
    loss, tokens, seconds, timed = None, 0, 0.0, False
    while trainer.steps_done < t.steps and not requests:
        begin = time.perf_counter()
        watchdog.beat(f"step {trainer.steps_done + 1}")
        try:
            result = trainer.step()
        except RollBack as reason:
            if (path := checkpoint.latest(folder) or start) is None:
                raise TrainingError(f"{reason}; there is no checkpoint to go back to") from None
            trainer.roll_back(path)
            metrics.rewind(trainer.steps_done)
            continue
        took, loss, saved = time.perf_counter() - begin, result.loss, None
        metrics.write({**dataclasses.asdict(result), "step_ms": round(took * 1e3, 3)})
        if timed:
            tokens, seconds = tokens + result.tokens, seconds + took
        timed = True  # the first step also allocates and compiles
        speed = tokens / seconds if seconds else 0.0
        progress.update(result.step, f"loss {loss:.4f}  lr {result.lr:.2e}  {speed:.0f} tokens/s")
        if t.save_every and result.step % t.save_every == 0:
            saved = _save(trainer, folder, metrics)
    return Result(
        steps=trainer.steps_done,
        loss=loss,
        tokens_per_s=tokens / seconds if seconds else 0.0,
        interrupted=trainer.steps_done < t.steps,
        fallbacks=dict(session.fallbacks + session.compiled),
        checkpoint=saved or _save(trainer, folder, metrics),
    )


def _save(trainer: Trainer, folder: Path, metrics: Metrics) -> Path:
    metrics.sync()  # the checkpoint promises every line before it
    what = f"checkpoint of step {trainer.steps_done}"
    watchdog.beat(what)
    with failure.explained(trainer.backend.name, what):
        return trainer.save(folder)
