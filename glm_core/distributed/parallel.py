"""What a training step does under a plan: each process takes its rows, gradients are summed where
parameters are held more than once, and one norm covers everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from glm_core import ops
from glm_core.backends.base import Backend
from glm_core.config import RunConfig
from glm_core.diagnose import nonfinite
from glm_core.distributed import apply, schedule
from glm_core.distributed import mesh as meshes
from glm_core.distributed.checkpoint import shards_of
from glm_core.distributed.collectives import all_reduce
from glm_core.distributed.layout import chunks, is_expert, splits_of
from glm_core.distributed.plan import Plan, at_both_ends, partial, replicated, require_fit
from glm_core.errors import ConfigError
from glm_core.training.batches import Batch, Sampler
from glm_core.training.optimizer import Optimizer, own_part, sum_in_float32

MESSAGE = 2**25
"""elements that one collective of `add_up` sums"""
Chunk = tuple[str, tuple[int, ...], Tensor]
"""a parameter's name, the place of the values in the whole parameter, and the values"""
FIELDS = ("positions", "key_start", "key_end", "labels")


class ManyProcesses:
    """This process's part of the model under a plan, and its work with the other processes; see
    glm_core.training.parallel.Parallel. Every process draws the same global batch."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        mesh: DeviceMesh,
        backend: Backend,
        device: torch.device | None = None,
        timeout_s: float | None = None,
        weights: apply.Source | None = None,
    ) -> None:
        """weights: to start from; by default those of config.train.seed, as on one process.
        timeout_s: that of the mesh.
        Raises ConfigError where plan, model and job do not fit."""
        require_fit(
            plan,
            config.model,
            world=mesh.size(),
            global_batch=config.train.global_batch,
            length=config.data.length,
        )
        self.config, self.plan, self.mesh, self.backend = config, plan, mesh, backend
        self._weights = weights
        self.device = device or torch.device(mesh.device_type)
        self.dtype: torch.dtype = getattr(torch, config.train.dtype)
        self.experts = meshes.make_for_experts(plan, mesh, timeout_s)
        self.place = meshes.place(plan, mesh)
        self.model = apply.build(config.model, plan, mesh, self.experts, self.device, self.dtype)
        if plan.micro_batches > 1:
            sum_in_float32(self.model)
        self.ends = meshes.ends_group(mesh) if plan.pp > 1 and plan.schedule != "zbv" else None
        self.work = self._work()

    def _work(self) -> schedule.Work:
        return schedule.Work(
            self.model.stages, self.plan, self.mesh, self.config.model, self.device, self.dtype
        )

    def held(self, tensors: Mapping[str, Tensor]) -> list[Chunk]:
        """Returns copies of what this process holds of such tensors; by name: its part of each
        parameter, or of the parameter's gradient."""
        found: list[Chunk] = []
        for name, p in self.model.named_parameters():
            splits = splits_of(name, self.config.model, self.place)
            for place, part in chunks(tensors[name], splits, apply.own_rows(p)[0]):
                found.append((name, place, part.detach().clone()))
        return found

    @property
    def is_reporter(self) -> bool:
        return dist.get_rank() == 0

    def initial_weights(self) -> dict[str, Tensor]:
        c = self.config
        if self._weights is None:
            return apply.initial_values(self.model, c.model, self.place, c.train.seed)
        return apply.own_values(self.model, c.model, self.place, self._weights)

    def batches(self, sampler: Sampler, sequences: int) -> list[Batch]:
        return [sampler.next(sequences)]

    def forward_backward(self, batch: Batch, token_weight: Tensor) -> Tensor:
        """Takes this data-parallel rank's rows of the global batch; gradients are ZeRO shards where
        there is ZeRO. Returns the rows' loss where the last stage is held, else what the
        stages add to it."""
        mine = self._rows(batch.tokens)
        inputs = {f: getattr(batch, f)[mine].to(self.device) for f in FIELDS}
        inputs["token_weight"] = token_weight[mine].to(self.device)
        return self.work.run(batch.tokens[mine].to(self.device), inputs)

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

    def sum_gradients(self) -> None:
        grads = {
            n: own_part(p.grad) for n, p in self.model.named_parameters() if p.grad is not None
        }
        if self.plan.tp > 1:
            shares = replicated if self.plan.sp else partial
            add_up([g for n, g in grads.items() if shares(n)], self.mesh.get_group("tp"))
        if self.ends is not None:
            both = at_both_ends(self.config.model)
            add_up([grads[name] for name in both if name in grads], self.ends)
        if self.plan.dp > 1 and not self.plan.zero:
            for group, own in self._copies(grads):
                add_up(own, group)

    def _copies(self, grads: dict[str, Tensor]) -> Iterator[tuple[Any, list[Tensor]]]:
        """Yields groups of data-parallel ranks with the gradients of which each rank has a share:
        all of these ranks hold the same parameters, but not the same experts."""
        if self.experts is None:
            yield self.mesh.get_group("dp"), list(grads.values())
            return
        yield self.mesh.get_group("dp"), [g for n, g in grads.items() if not is_expert(n)]
        yield self.experts.get_group("expert_dp"), [g for n, g in grads.items() if is_expert(n)]

    def sum_loss(self, loss: Tensor) -> Tensor:
        for axis, size in (("dp", self.plan.dp), ("pp", self.plan.pp)):
            if size > 1:
                loss = all_reduce(loss, self.mesh.get_group(axis))
        return loss

    def sum_counts(self, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        c = self.config.model
        if not c.num_experts:
            return counts
        layers = range(c.num_dense_layers, c.num_layers + c.num_mtp_layers)
        names = [f"blocks.{i}.mlp.router.bias" for i in layers]
        whole = torch.zeros(len(names), c.num_experts, device=self.device)
        for name, row in counts.items():
            whole[names.index(name)] = row
        for axis, size in (("dp", self.plan.dp), ("pp", self.plan.pp)):
            if size > 1:
                whole = all_reduce(whole, self.mesh.get_group(axis))
        return dict(zip(names, whole, strict=True))

    def norm(self, grads: dict[str, Tensor]) -> Tensor:
        """Counts every element once, wherever it is held."""
        own = [g for n, g in grads.items() if self._counts(n)]
        squares = ops.global_norm(own).to(self.device).square()
        for axis, sharded in (
            ("tp", self.plan.tp > 1),
            ("pp", self.plan.pp > 1),
            ("dp", self.plan.zero > 0),
        ):
            if sharded:
                squares = all_reduce(squares, self.mesh.get_group(axis))
        if self.experts is not None and not self.plan.zero:
            squares = all_reduce(squares, self.experts.get_group("ep"))
        return squares.sqrt()

    def _counts(self, name: str) -> bool:
        """Whether this process counts a parameter that several processes hold: one of them does."""
        if replicated(name) and self.place.tp_rank != 0:
            return False
        if not (self.plan.zero or is_expert(name)) and self.place.ep_rank != 0:
            return False
        return name not in at_both_ends(self.config.model) or self.model.stages[0].is_first

    def locate_nonfinite(self, backward: Callable[[], object]) -> tuple[str, str]:
        """Quotes the process in which numbers stopped being finite first."""
        stages = self.model.stages
        with nonfinite.watch(stages[0] if len(stages) == 1 else self.model) as seen:
            backward()
        every: list[Any] = [None] * self.mesh.size()
        dist.all_gather_object(every, (seen.op, seen.parameter))
        # an op whose input was not finite says "either)": it is not the first
        rank = min(range(len(every)), key=lambda r: (not every[r][0], "either)" in every[r][0], r))
        op, parameter = every[rank]
        return (f"{op} on rank {rank}" if op else ""), parameter

    def tensors(self, optimizer: Optimizer) -> dict[str, Any]:
        """Views of this process's part, each with its place in the whole, so that a run under any
        other plan goes on from them."""
        found = {}
        for key, own in optimizer.state()["tensors"].items():
            name = key.partition(".")[2]
            splits = splits_of(name, self.config.model, self.place)
            found[key] = shards_of(optimizer.trained[name], splits, own)
        return found

    def restore_random_state(self, tensors: dict[str, Any]) -> None:
        """Nothing under a plan draws random numbers."""

    def facts(self) -> dict[str, Any]:
        return {"plan": self.plan.label()}


def add_up(grads: list[Tensor], group: Any) -> None:
    """Sums the gradients over the group, in place; the sums are formed in float32."""
    for parts in messages(grads):
        sizes = [len(part) for part in parts]
        flat = torch.empty(sum(sizes), dtype=torch.float32, device=parts[0].device)
        torch.cat(parts, out=flat)
        dist.all_reduce(flat, group=group)
        for part, summed in zip(parts, flat.split(sizes), strict=True):
            part.copy_(summed)


def messages(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yields all elements of the gradients in order, as flat views, MESSAGE of them at a time."""
    parts: list[Tensor] = []
    room = MESSAGE
    for grad in grads:
        rest = grad.view(-1)
        while len(rest):
            parts.append(rest[:room])
            rest, room = rest[room:], room - len(parts[-1])
            if not room:
                yield parts
                parts, room = [], MESSAGE
    if parts:
        yield parts
