"""Runs training as the verdict needs it: on any backend, perhaps in disguise, with its data hashed
and a snapshot of each captured step."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from glm_core.align.capture import Call, capture
from glm_core.align.trace_format import FallbackCount, fallback_counts
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.config import RunConfig
from glm_core.data.sampler import Batch as SampledBatch
from glm_core.diagnose import device_errors, watchdog
from glm_core.errors import DeviceError, TrainingError
from glm_core.training.batches import Batch, Sampler
from glm_core.training.parallel import Parallel, SingleProcess
from glm_core.training.trainer import Trainer

if TYPE_CHECKING:
    from glm_core.align.watched_run import Watch

Mode = Callable[[], AbstractContextManager[Any]]
FIELDS = ("tokens", "labels", "loss_weight", "positions", "key_start", "key_end")


@dataclasses.dataclass(slots=True)
class Snapshot:
    """The inputs of a captured step, which are replayed on both sides."""

    step: int
    weights: dict[str, Tensor]
    """float32, before the step"""
    batches: list[Batch]
    loss_scale: float = 1.0
    """of the step"""


class Run(Trainer):
    """A trainer that hashes its data; `mode` is active around forward and backward, never around
    the optimizer."""

    def __init__(
        self,
        config: RunConfig,
        sampler: Sampler,
        backend: str | Backend,
        weights: dict[str, Tensor] | None = None,
        mode: Mode = contextlib.nullcontext,
        parallel: Parallel | None = None,
    ) -> None:
        """backend: or its name. weights: to start from instead of the config's seed. parallel: this
        process's part of a plan, by default one process."""
        if isinstance(backend, str):
            backend = registry.usable(backend)
        if backend.name == "reference":  # exact sums are a candidate's
            fast = dataclasses.replace(config.train, exact=False)
            config = dataclasses.replace(config, train=fast)
        alone = parallel or SingleProcess(config, backend, weights=weights)
        super().__init__(config, sampler, alone)
        self.mode = mode
        self.hash = hashlib.sha256()
        self.drawn: list[Batch] = []

    def batches(self) -> list[Batch]:
        """As Trainer.batches; sequences enter the hash one by one, whatever the micro-batch."""
        self.drawn = super().batches()
        for batch in self.drawn:
            for row in range(len(batch.tokens)):
                for field in FIELDS:
                    self.hash.update(getattr(batch, field)[row].contiguous().numpy().tobytes())
        return self.drawn

    def backward(self, batches: list[Batch]) -> Tensor:
        """As Trainer.backward, under the mode."""
        with self.mode():
            return super().backward(batches)

    def gradients(self, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
        """Returns the loss, and the gradients in float64 on the CPU; makes no update."""
        watchdog.beat("gradients of a captured step")
        with (
            registry.use(self.backend, exact=self.config.train.exact),
            device_errors.explained(self.backend.name, "gradients of a captured step"),
        ):
            loss = float(self.backward(split(batches, self.config.train.micro_batch)))
            scale = self.loss_scale.scale
            return loss, {
                n: torch.zeros_like(p, dtype=torch.float64, device="cpu")
                if p.grad is None
                else p.grad.cpu().double() / scale
                for n, p in self.model.named_parameters()
            }


def split(batches: list[Batch], micro_batch: int) -> list[Batch]:
    """Returns the same sequences in micro-batches of another size."""
    if all(len(b.tokens) == micro_batch for b in batches):
        return batches
    whole = {f: torch.cat([getattr(b, f) for b in batches]) for f in FIELDS}
    parts = {f: x.split(micro_batch) for f, x in whole.items()}
    return [SampledBatch(**{f: parts[f][i] for f in FIELDS}) for i in range(len(parts["tokens"]))]


@dataclasses.dataclass(slots=True)
class Curve:
    """Loss, gradient norm and loss scale per step of a free run (NaN from where it broke off)."""

    loss: Any
    grad_norm: Any
    loss_scale: Any
    skipped: Any
    """1 where a gradient overflowed and the update was left out, else 0"""
    fallbacks: list[FallbackCount]
    data_order: str
    snapshots: list[Snapshot]
    calls: list[Call]


def free_run(
    run: Run,
    capture_steps: tuple[int, ...] = (),
    progress: Callable[[int], None] | None = None,
    last: int | None = None,
    watch: Watch | None = None,
) -> Curve:
    """Trains `run` to step `last` (default: its last). A step whose gradients overflow is no
    arithmetic to judge: the next one is captured in its place. A TrainingError in a step ends the
    curve there. `watch` sees every step, and may end the run. Raises DeviceError where the device
    gives up."""
    steps = last or run.config.train.steps
    loss, grad_norm, loss_scale, skipped = np.full((4, steps), np.nan)
    curve = Curve(loss, grad_norm, loss_scale, skipped, [], "", [], [])
    wanted = False
    with registry.use(run.backend, exact=run.config.train.exact) as session:
        for step in range(1, steps + 1):
            watchdog.beat(f"step {step}")
            wanted = wanted or step in capture_steps
            with contextlib.ExitStack() as stack:
                if wanted:
                    weights = {n: w.cpu().clone() for n, w in run.optimizer.master.items()}
                    captured = stack.enter_context(capture(run.model, step))
                if watch is not None:
                    stack.enter_context(watch.step(run.model, step))
                result = None
                try:
                    result = run.step()
                except DeviceError:
                    raise
                except TrainingError:
                    pass  # the curve ends here; the step is judged all the same
            if watch is not None and not (result and result.skipped):
                watch.judge()
            if result is None:
                break
            if wanted and not result.skipped:
                snapshot = Snapshot(step, weights, run.drawn, result.loss_scale)
                curve.snapshots.append(snapshot)
                curve.calls += captured.calls
                wanted = False
            curve.loss[step - 1], curve.grad_norm[step - 1] = result.loss, result.grad_norm
            curve.loss_scale[step - 1] = result.loss_scale
            curve.skipped[step - 1] = result.skipped
            if progress is not None:
                progress(step)
            if watch is not None and watch.ends_run:
                break
    curve.fallbacks = fallback_counts(session.fallbacks + session.compiled)
    curve.data_order = run.hash.hexdigest()
    return curve


def moved(weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Returns every float32 weight moved by one ulp, up or down at random."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, w in weights.items():
        up = torch.randint(0, 2, w.shape, generator=generator).bool()
        far = torch.full_like(w, torch.inf)
        out[name] = torch.nextafter(w, torch.where(up, far, -far))
    return out


def weights_hash(weights: dict[str, Tensor]) -> str:
    """Returns the sha256 over names and float32 values."""
    h = hashlib.sha256()
    for name, w in sorted(weights.items()):
        h.update(name.encode() + w.detach().float().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()
