"""One trainer for one process or many: it advances a run by steps, and saves and restores it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glm_core import dispatch
from glm_core.backends.base import Backend
from glm_core.config import RunConfig, to_dict
from glm_core.diagnose import device_errors, nonfinite
from glm_core.errors import ConfigError
from glm_core.training.balance import Balance
from glm_core.training.batches import Batch, Sampler, global_batch
from glm_core.training.checkpoint import Checkpoints, Saved, require_same
from glm_core.training.loss_scale import LossScale, initial_loss_scale
from glm_core.training.metrics import Metrics
from glm_core.training.offload import make_optimizer
from glm_core.training.optimizer import Optimizer, learning_rate
from glm_core.training.parallel import Parallel, SingleProcess
from glm_core.training.policy import Policy


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """The figures of one optimizer step, as they go into the metrics and the trace."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    global_batch: int
    loss_scale: float
    skipped: bool
    expert_load: list[list[float]]
    """of each sparse layer's experts, over the mean; empty without experts"""

    def figures(self) -> dict[str, Any]:
        """Returns them by name. `expert_load`, and the largest of all, are there with experts
        only."""
        plain = dataclasses.asdict(self)
        if not self.expert_load:
            del plain["expert_load"]
            return plain
        return plain | {"expert_load_ratio": max(map(max, self.expert_load))}


class Trainer:
    """Advances a training run by `step`, alone or as one of many processes that all call it alike.
    The backend must be active around `step` (`registry.use`). Loss and gradient norm are those of
    the global batch on every process, so all of them decide alike."""

    config: RunConfig
    parallel: Parallel
    """holds this process's part of the model and works together with the other processes"""
    backend: Backend
    device: torch.device
    dtype: torch.dtype
    model: nn.Module
    sampler: Sampler
    optimizer: Optimizer
    balance: Balance
    loss_scale: LossScale
    policy: Policy
    checkpoints: Checkpoints | None
    """None for a trainer that saves nothing"""
    metrics: Metrics | None
    """None where nothing, or another process, reports"""
    timed: Callable[[int], AbstractContextManager[Any]]
    """around each step, with its number"""
    steps_done: int
    samples_seen: int

    def __init__(
        self,
        config: RunConfig,
        sampler: Sampler,
        parallel: Parallel | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        """parallel: by default this process alone, on the config's backend."""
        self.config, self.sampler, self.checkpoints = config, sampler, checkpoints
        self.parallel = parallel = parallel or SingleProcess(config)
        self.backend, self.device, self.dtype = parallel.backend, parallel.device, parallel.dtype
        self.model = parallel.model
        self.optimizer = make_optimizer(self.model, config.train, parallel.norm)
        self.optimizer.load_masters(parallel.initial_weights())
        self.balance = Balance(self.model, self.optimizer, config.train.balance_rate)
        self.loss_scale = initial_loss_scale(config.train)
        self.policy = Policy(config.policy, parallel.is_reporter)
        self.metrics = None
        self.timed = nullcontext
        self.steps_done = self.samples_seen = 0

    def step(self) -> StepResult:
        """Does one optimizer step. A float16 overflow skips the update and lowers the loss scale.
        What follows from another loss or gradient that is not finite, and from a spike, the policy
        decides: TrainingError, RollBack or a skipped update, weights untouched. Raises DeviceError
        where the device gives up."""
        t, number = self.config.train, self.steps_done + 1
        if t.exact and not dispatch.session().exact:
            raise ConfigError(
                "train.exact=True: the session is not exact; open registry.use(NAME, exact=True)"
            )
        scale, lr = self.loss_scale.scale, learning_rate(t, number)
        with device_errors.explained(self.backend.name, f"step {number}"), self.timed(number):
            self.model.train()
            batches = self.batches()
            loss = float(self.backward(batches))

            spike = self.policy.spike(loss)
            norm = math.nan
            if math.isfinite(loss) and not spike:
                norm = float(self.optimizer.step(lr, scale))  # no update if it is not finite
            skipped = not math.isfinite(norm)
            if spike:
                self.policy.decide(number, "spike", spike)
            elif not self._loss_scale_explains(skipped):
                what = f"gradient norm is {norm}" if math.isfinite(loss) else f"loss is {loss}"
                self.policy.decide(number, "nonfinite", self._locate(batches, f"the {what}"))
            loads = self.balance.loads(self.parallel.sum_counts)
            if not skipped:
                self.balance.move_biases()
                self.policy.good(number, loss)

        sequences = sum(len(b.tokens) for b in batches)
        tokens = sum(b.tokens.numel() for b in batches)
        self.steps_done = number
        self.samples_seen += sequences
        return StepResult(number, loss, norm, lr, tokens, sequences, scale, skipped, loads)

    def batches(self) -> list[Batch]:
        """Draws the sequences of the next step, on the CPU: micro-batches on one process, the
        global batch on many, where each takes its rows."""
        sequences = global_batch(self.config.train, self.samples_seen)
        return self.parallel.batches(self.sampler, sequences)

    def backward(self, batches: list[Batch]) -> Tensor:
        """Forward and backward over the batches. Leaves in `.grad` the gradient of the global
        batch, multiplied by the loss scale. Returns the loss over the global batch, a float32
        scalar: the same for every split into micro-batches and over processes."""
        self.model.zero_grad(set_to_none=True)
        self.balance.counts.zero_()
        scale = self.loss_scale.scale
        total = sum(float(b.loss_weight.sum()) for b in batches)
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            loss += self.parallel.forward_backward(batch, batch.loss_weight * (scale / total))
        self.parallel.sum_gradients()
        return self.parallel.sum_loss(loss) / scale

    def _loss_scale_explains(self, skipped: bool) -> bool:
        """Adapts the loss scale of a float16 run. Returns False where the step was skipped and no
        lower scale is the remedy."""
        scale = self.loss_scale
        if self.config.train.dtype != "float16" or (skipped and scale.scale <= scale.minimum):
            return not skipped
        scale.update(skipped)
        return True

    def _locate(self, batches: list[Batch], subject: str) -> str:
        """Runs the failed step's backward again, from the same weights, and says after `the loss is
        nan` where numbers stopped being finite."""
        op, parameter = self.parallel.locate_nonfinite(lambda: self.backward(batches))
        return nonfinite.message(subject, op, parameter)

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the tensors and JSON-able facts from which `restore` goes on, bit for bit."""
        facts = {
            "config": to_dict(self.config),
            "step": self.steps_done,
            "samples_seen": self.samples_seen,
            "optimizer_steps": self.optimizer.step_count,
            "loss_scale": self.loss_scale.state(),
            "policy": self.policy.state(),
            **self.parallel.facts(),
            "sampler": self.sampler.state(),
        }
        return self.parallel.tensors(self.optimizer), facts

    def save(self) -> Path:
        """Writes a checkpoint of now, or begins to. Raises CheckpointError."""
        assert self.checkpoints is not None
        return self.checkpoints.save(self.steps_done, *self.state())

    def restore(self, saved: Saved) -> None:
        """Goes on where the checkpoint was taken, whatever plan that was under. Raises
        CheckpointError, or DataError where the text is another."""
        facts = saved.facts
        require_same(facts["config"], self.config, saved.path)
        self.sampler.restore(facts["sampler"])
        tensors = self.parallel.tensors(self.optimizer)
        saved.fill(tensors)
        self.optimizer.resume(facts["optimizer_steps"])
        self.parallel.restore_random_state(tensors)
        self.loss_scale.restore(facts["loss_scale"])
        self.policy.restore(facts.get("policy", self.policy.state()))  # older ones have none
        self.samples_seen, self.steps_done = facts.get("samples_seen", 0), facts["step"]

    def roll_back(self, saved: Saved) -> None:
        """Restores weights, optimizer and step, but leaves the data where they are now: what led to
        the bad step is passed over (Chowdhery et al. 2022, section 5.1)."""
        data = self.sampler.state()
        self.restore(saved)
        self.sampler.restore(data)
