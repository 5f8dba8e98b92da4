"""One training step under a plan: rows to their ranks, gradients summed where parameters are held
more than once, one norm over everything, one optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from glm_core import ops
from glm_core.config import RunConfig
from glm_core.diagnose import nonfinite
from glm_core.distributed import apply, schedule
from glm_core.distributed import mesh as meshes
from glm_core.distributed.collectives import all_reduce
from glm_core.distributed.plan import Plan, require_fit
from glm_core.distributed.tensor_parallel import replicated
from glm_core.errors import ConfigError
from glm_core.training.loop import StepResult, Updates
from glm_core.training.optimizer import Optimizer, own_part, sum_in_float32
from glm_core.training.trainer import Batch

MESSAGE = 2**25
"""elements that one collective of `add_up` sums"""
FIELDS = ("positions", "key_start", "key_end", "labels")


class Engine(Updates):
    """This process's part of one training run. The backend must be active around `train_step`, and
    every process must call it with the same global batch."""

    def __init__(
        self, config: RunConfig, plan: Plan, mesh: DeviceMesh, device: torch.device | None = None
    ) -> None:
        """Weights start from config.train.seed, as on one process. Raises ConfigError where plan,
        model and job do not fit."""
        c = config
        require_fit(
            plan,
            c.model,
            world=mesh.size(),
            global_batch=c.train.global_batch,
            length=c.data.length,
        )
        self.plan, self.mesh = plan, mesh
        self.device = device or torch.device(mesh.device_type)
        dtype: torch.dtype = getattr(torch, c.train.dtype)
        self.share = apply.build(c.model, plan, mesh, self.device, dtype)
        if plan.micro_batches > 1:
            sum_in_float32(self.share)
        optimizer = Optimizer(self.share, c.train, self.norm)
        super().__init__(c, optimizer, tells=dist.get_rank() == 0)
        self.optimizer.load_masters(apply.initial_values(self.share, c.model, mesh, c.train.seed))
        self.ends = meshes.ends_group(mesh) if plan.pp > 1 and plan.schedule != "zbv" else None
        self.work = schedule.Work(self.share.stages, plan, mesh, c.model, self.device, dtype)

    def train_step(self, batch: Batch) -> StepResult:
        """Forward, backward and update (`Updates.update`) on a global batch, which is the same on
        every process: each data-parallel rank takes its rows."""
        loss = float(self.backward(batch))
        return self.update(
            loss, len(batch.tokens), batch.tokens.numel(), lambda what: self._explain(batch, what)
        )

    def _explain(self, batch: Batch, subject: str) -> str:
        """Runs the failed step's backward again on every process, watched, and quotes the one in
        which numbers stopped being finite."""
        [alone, *more] = self.share.stages
        with nonfinite.watch(self.share if more else alone) as seen:
            self.backward(batch)
        every: list[Any] = [None] * self.mesh.size()
        dist.all_gather_object(every, (seen.op, seen.parameter))
        # an op that was given what is not finite says so
        rank = min(range(len(every)), key=lambda r: (not every[r][0], "either)" in every[r][0], r))
        op, parameter = every[rank]
        return nonfinite.message(subject, f"{op} on rank {rank}" if op else "", parameter)

    def backward(self, batch: Batch) -> Tensor:
        """Leaves every parameter's gradient of the global batch, times the loss scale, in `.grad`
        (a ZeRO shard where there is ZeRO). Returns the loss over the global batch, float32, the
        same on every process."""
        for p in self.share.parameters():
            p.grad = None
        scale = self.loss_scale.scale
        # every rank has the whole batch, so the global sum costs no communication
        weight = batch.loss_weight * (scale / float(batch.loss_weight.sum()))
        mine = self._rows(batch.tokens)
        inputs = {f: getattr(batch, f)[mine].to(self.device) for f in FIELDS}
        inputs["token_weight"] = weight[mine].to(self.device)
        loss = self.work.run(batch.tokens[mine].to(self.device), inputs)
        self._sum_gradients()
        for axis, size in (("dp", self.plan.dp), ("pp", self.plan.pp)):
            if size > 1:
                loss = all_reduce(loss, self.mesh.get_group(axis))
        return loss / scale

    def _rows(self, tokens: Tensor) -> slice:
        ranks, m = self.plan.dp, self.plan.micro_batches
        each, rest = divmod(len(tokens), ranks)
        if rest or each % m:
            raise ConfigError(
                f"plan {self.plan.label()}: dp * micro_batches = {ranks * m} does not divide a "
                f"batch of {len(tokens)} sequences; use a multiple"
            )
        first = self.mesh.get_local_rank("dp") * each
        return slice(first, first + each)

    def _sum_gradients(self) -> None:
        """Adds up the shares of a gradient that several processes have."""
        grads = {
            n: own_part(p.grad) for n, p in self.share.named_parameters() if p.grad is not None
        }
        if self.plan.sp:
            add_up([g for n, g in grads.items() if replicated(n)], self.mesh.get_group("tp"))
        if self.ends is not None and self.config.model.tied_head and "embedding" in grads:
            add_up([grads["embedding"]], self.ends)
        if self.plan.dp > 1 and not self.plan.zero:
            add_up(list(grads.values()), self.mesh.get_group("dp"))

    def norm(self, grads: dict[str, Tensor]) -> Tensor:
        """The norm of the whole gradient, every element counted once wherever it is held."""
        own = [g for n, g in grads.items() if self._counts(n)]
        squares = ops.global_norm(own).to(self.device).square()
        for axis, sharded in (
            ("tp", self.plan.tp > 1),
            ("pp", self.plan.pp > 1),
            ("dp", self.plan.zero > 0),
        ):
            if sharded:
                squares = all_reduce(squares, self.mesh.get_group(axis))
        return squares.sqrt()

    def _counts(self, name: str) -> bool:
        """Of a parameter that several processes hold, one counts it."""
        if replicated(name) and self.mesh.get_local_rank("tp") != 0:
            return False
        return name != "embedding" or self.share.stages[0].is_first


def add_up(grads: list[Tensor], group: Any) -> None:
    """Sums the gradients over the group, in place; the sums are formed in float32."""
    for pieces in messages(grads):
        sizes = [len(piece) for piece in pieces]
        flat = torch.empty(sum(sizes), dtype=torch.float32, device=pieces[0].device)
        torch.cat(pieces, out=flat)
        dist.all_reduce(flat, group=group)
        for piece, summed in zip(pieces, flat.split(sizes), strict=True):
            piece.copy_(summed)


def messages(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """All elements of the gradients in order, as flat views, MESSAGE of them at a time."""
    pieces: list[Tensor] = []
    room = MESSAGE
    for grad in grads:
        rest = grad.view(-1)
        while len(rest):
            pieces.append(rest[:room])
            rest, room = rest[room:], room - len(pieces[-1])
            if not room:
                yield pieces
                pieces, room = [], MESSAGE
    if pieces:
        yield pieces
