"""Trains data parallel with the bits of one process: exact runs (docs/exact.md)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from glm_core import ops
from glm_core.config import RunConfig
from glm_core.distributed import schedule
from glm_core.distributed.parallel import FIELDS, ManyProcesses, messages
from glm_core.distributed.plan import Plan
from glm_core.errors import ConfigError
from glm_core.training.batches import Batch
from glm_core.training.optimizer import sum_in_float32
from glm_core.training.row_tree import RowTree


class ExactProcesses(ManyProcesses):
    """Data-parallel processes that add the gradients of their sequences by the tree of one process:
    each sums a subtree, and the ranks are its next leaves."""

    def __init__(self, config: RunConfig, plan: Plan, *args: Any) -> None:
        """Takes the arguments of ManyProcesses. Raises ConfigError for a plan that cannot keep the
        tree."""
        _require_tree(config, plan)
        super().__init__(config, plan, *args)
        sum_in_float32(self.model)
        one = dataclasses.replace(plan, micro_batches=1)
        self.work = schedule.Work(
            self.model.stages, one, self.mesh, config.model, self.device, self.dtype
        )
        self._tree = RowTree(self.model)

    def forward_backward(self, batch: Batch, token_weight: Tensor) -> Tensor:
        """Adds this rank's sequences to its tree; `sum_loss` returns the loss of all."""
        mine = self._rows(batch.tokens)
        inputs = {f: getattr(batch, f)[mine].to(self.device) for f in FIELDS}
        inputs["token_weight"] = token_weight[mine].to(self.device)
        for i, tokens in enumerate(batch.tokens[mine].to(self.device).split(1)):
            self._tree.add(self.work.run(tokens, {k: x[i : i + 1] for k, x in inputs.items()}))
        return torch.zeros((), device=self.device)

    def sum_gradients(self) -> None:
        self._loss = self._tree.finish()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        _add_ranks([*grads, self._loss], self.mesh.get_group("dp"))

    def sum_loss(self, loss: Tensor) -> Tensor:
        return self._loss

    def norm(self, grads: dict[str, Tensor]) -> Tensor:
        """Every process has the whole gradient."""
        return ops.global_norm(list(grads.values()))


def _require_tree(config: RunConfig, plan: Plan) -> None:
    t, label = config.train, plan.label()
    kept, plain = ("dp", "micro_batches", "recompute"), Plan()
    fields = [f.name for f in dataclasses.fields(plan) if f.name not in kept]
    if any(getattr(plan, name) != getattr(plain, name) for name in fields):
        raise ConfigError(
            f"plan {label}: train.exact=True keeps its order of sums under dp and micro_batches "
            "alone; leave the other axes out, or exact"
        )
    each = t.global_batch // plan.dp
    if t.ramp_from or plan.dp & (plan.dp - 1) or each & (each - 1):
        raise ConfigError(
            f"plan {label}: train.exact=True adds {t.global_batch} sequences by a binary tree, "
            f"which dp={plan.dp} cuts only where dp and global_batch / dp are powers of 2 and "
            "do not grow; change them"
        )


def _add_ranks(tensors: list[Tensor], group: Any) -> None:
    """Adds the tensors up over the ranks, in place: neighbours first, then pairs of neighbours."""
    for parts in messages(tensors):
        sizes = [len(part) for part in parts]
        flat = torch.cat(parts)
        every = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, flat, group=group)
        while len(every) > 1:
            every = [a.add_(b) for a, b in zip(every[::2], every[1::2], strict=True)]
        for part, summed in zip(parts, every[0].split(sizes), strict=True):
            part.copy_(summed)
