"""One training run as the verdict needs it: on any backend, perhaps in disguise, its data hashed,
the state before a captured step kept."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

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
from glm_core.training.trainer import Batch, Sampler, Trainer

Mode = Callable[[], AbstractContextManager[Any]]
FIELDS = ("tokens", "labels", "loss_weight", "positions", "key_start", "key_end")


@dataclasses.dataclass(slots=True)
class Snapshot:
    """The inputs of a captured step, which are replayed on both sides."""

    step: int
    weights: dict[str, Tensor]
    """float32, before the step"""
    batches: list[Batch]


class Run(Trainer):
    """A trainer on a backend given by name or object; `mode` is active around forward and
    backward, never around the optimizer."""

    def __init__(
        self,
        config: RunConfig,
        sampler: Sampler,
        backend: str | Backend,
        weights: dict[str, Tensor] | None = None,
        mode: Mode = contextlib.nullcontext,
    ) -> None:
        chosen = registry.usable(backend) if isinstance(backend, str) else backend
        place = backend if isinstance(backend, str) else f"reference:{chosen.device_type}"
        train = dataclasses.replace(config.train, backend=place)
        super().__init__(dataclasses.replace(config, train=train), sampler, weights=weights)
        self.backend, self.device, self.mode = chosen, chosen.device(), mode
        self.hash = hashlib.sha256()
        self.given: list[Batch] = []

    def batches(self) -> list[Batch]:
        """As the trainer's; sequences enter the hash one by one, whatever the micro-batch."""
        self.given = super().batches()
        for batch in self.given:
            for row in range(len(batch.tokens)):
                for field in FIELDS:
                    self.hash.update(getattr(batch, field)[row].contiguous().numpy().tobytes())
        return self.given

    def backward(self, batches: list[Batch]) -> Tensor:
        """As the trainer's, in disguise."""
        with self.mode():
            return super().backward(batches)

    def gradients(self, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
        """Loss, and gradients in float64 on the CPU, without an update."""
        self.model.zero_grad(set_to_none=True)
        watchdog.beat("gradients of a captured step")
        with (
            registry.use(self.backend),
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
    """The same sequences in micro-batches of another size."""
    if all(len(b.tokens) == micro_batch for b in batches):
        return batches
    whole = {f: torch.cat([getattr(b, f) for b in batches]) for f in FIELDS}
    parts = {f: x.split(micro_batch) for f, x in whole.items()}
    return [SampledBatch(**{f: parts[f][i] for f in FIELDS}) for i in range(len(parts["tokens"]))]


@dataclasses.dataclass(slots=True)
class Curve:
    """A free run: loss and gradient norm per step (NaN from where it broke off)."""

    loss: Any
    grad_norm: Any
    fallbacks: list[FallbackCount]
    data_order: str
    snapshots: list[Snapshot]
    calls: list[Call]


def free_run(
    run: Run,
    capture_steps: tuple[int, ...] = (),
    progress: Callable[[int], None] | None = None,
    last: int | None = None,
) -> Curve:
    """Trains `run` to step `last` (default: its last). A step that cannot be done (TrainingError)
    ends it; a device that gives up is the caller's affair (DeviceError)."""
    steps = last or run.config.train.steps
    curve = Curve(np.full(steps, np.nan), np.full(steps, np.nan), [], "", [], [])
    with registry.use(run.backend) as session:
        for step in range(1, steps + 1):
            watchdog.beat(f"step {step}")
            with contextlib.ExitStack() as stack:
                if step in capture_steps:
                    weights = {n: w.cpu().clone() for n, w in run.optimizer.master.items()}
                    captured = stack.enter_context(capture(run.model, step))
                try:
                    result = run.step()
                except DeviceError:
                    raise
                except TrainingError:
                    break
            if step in capture_steps:
                curve.snapshots.append(Snapshot(step, weights, run.given))
                curve.calls += captured.calls
            curve.loss[step - 1], curve.grad_norm[step - 1] = result.loss, result.grad_norm
            if progress is not None:
                progress(step)
    curve.fallbacks = fallback_counts(session.fallbacks + session.compiled)
    curve.data_order = run.hash.hexdigest()
    return curve


def moved(weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Every float32 weight moved by one ulp, up or down at random."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, w in weights.items():
        up = torch.randint(0, 2, w.shape, generator=generator).bool()
        far = torch.full_like(w, torch.inf)
        out[name] = torch.nextafter(w, torch.where(up, far, -far))
    return out


def weights_hash(weights: dict[str, Tensor]) -> str:
    """sha256 over names and float32 values."""
    h = hashlib.sha256()
    for name, w in sorted(weights.items()):
        h.update(name.encode() + w.detach().float().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()
