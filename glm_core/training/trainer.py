"""One training run: batches through the model, gradients accumulated, clipped AdamW, everything
reproducible and resumable."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from glm_core.backends import registry
from glm_core.config import RunConfig, TrainConfig
from glm_core.diagnose import device_errors, nonfinite, watchdog
from glm_core.errors import ConfigError
from glm_core.model.glm import GLM
from glm_core.training import checkpoint
from glm_core.training.interrupt import stop_requests
from glm_core.training.live import Live
from glm_core.training.loop import Result, Saves, StepResult, Updates, loop, way_out
from glm_core.training.metrics import Metrics
from glm_core.training.optimizer import Optimizer, sum_in_float32


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


def global_batch(config: TrainConfig, samples_seen: int) -> int:
    """Sequences of the next step: `ramp_from`, growing by `ramp_increment` in equal shares of
    `ramp_samples` (Zeng et al. 2022, appendix B.1)."""
    if not config.ramp_from:
        return config.global_batch
    increments = max(1, (config.global_batch - config.ramp_from) // config.ramp_increment)
    done = samples_seen * increments // max(1, config.ramp_samples)
    return min(config.global_batch, config.ramp_from + done * config.ramp_increment)


class Trainer(Updates):
    """Model, optimizer and sampler of one run, advanced by `step()`. The backend must be active
    around `step` (`registry.use`); `run` in this module does both."""

    def __init__(
        self,
        config: RunConfig,
        sampler: Sampler,
        *,
        weights: dict[str, Tensor] | None = None,
        model: GLM | None = None,
    ) -> None:
        """weights: to start from; model: one that has its weights, of which only those that are not
        frozen are trained and saved."""
        self.sampler = sampler
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
        super().__init__(config, Optimizer(self.model, config.train))
        if model is None:
            self.optimizer.load_masters(initial_weights(config) if weights is None else weights)
        t = config.train
        if t.global_batch > t.micro_batch:
            sum_in_float32(self.model)
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
                batch.tokens,
                batch.positions,
                batch.key_start,
                batch.key_end,
                batch.labels,
                weight,
            )
            part = self.loss(*(x.to(self.device) for x in inputs))
            part.backward()
            loss += part.detach()
        return loss / self.loss_scale.scale

    def step(self) -> StepResult:
        """One optimizer step: as `Updates.update`. A device that gives up: DeviceError."""
        with device_errors.explained(self.backend.name, f"step {self.steps_done + 1}"):
            self.model.train()
            batches = self.batches()
            self.model.zero_grad(set_to_none=True)
            loss = float(self.backward(batches))
            sequences = sum(len(b.tokens) for b in batches)
            tokens = sum(b.tokens.numel() for b in batches)
            return self.update(
                loss, sequences, tokens, lambda subject: self._explain(batches, subject)
            )

    def _explain(self, batches: list[Batch], subject: str) -> str:
        """Runs the failed step's backward again, watched and not compiled, from the same
        weights."""
        compiled, self.loss = self.loss, self.model.loss
        self.model.zero_grad(set_to_none=True)
        with nonfinite.watch(self.model) as seen:
            self.backward(batches)
        self.loss = compiled
        return nonfinite.message(subject, seen.op, seen.parameter)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able facts from which `restore` goes on, bit for bit."""
        rng = {"rng.torch": torch.get_rng_state(), "rng.backend": self.backend.rng_state()}
        facts = {**self.facts(), "sampler": self.sampler.state()}
        return {**self.optimizer.state()["tensors"], **rng}, facts

    def restore(self, path: Path) -> None:
        """Goes on where the checkpoint was taken. Raises CheckpointError, or DataError where the
        text is another."""
        path = checkpoint.find(path)
        tensors, facts = checkpoint.load(path)
        checkpoint.require_same(facts["config"], self.config, path)
        checkpoint.require_fit(tensors, self.state()[0], path)
        self.sampler.restore(facts["sampler"])
        self.restore_facts(facts, tensors)
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
        # here, so that a sampler of the caller's own needs no sentencepiece
        from glm_core.data.open import open_sampler

        sampler = open_sampler(config.data, t.seed, cache_dir, positions=config.model.positions)
    folder = out / checkpoint.FOLDER

    def latest() -> Path | None:
        return checkpoint.latest(folder) or start

    subject, remedy = f"backend {t.backend}", f"reset the device, then resume from {folder}"
    with way_out(out, latest):
        with device_errors.explained(t.backend, "start"):
            trainer = Trainer(config, sampler, model=model)
            if start is not None:
                trainer.restore(start)
        out.mkdir(parents=True, exist_ok=True)
        with (
            watchdog.guard(timeout_s, subject, remedy),
            closing(Metrics(out, trainer.steps_done, tensorboard, live)) as metrics,
            registry.use(trainer.backend, strict=t.strict) as session,
            stop_requests() as requests,
        ):
            checkpoint.describe(out, config, sampler)
            saves = Saves(save=lambda: trainer.save(folder), latest=latest, start=start)
            return loop(trainer, saves, metrics, session, lambda: bool(requests))
