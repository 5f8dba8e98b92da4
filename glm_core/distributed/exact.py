"""Trains under a plan with the bits of one process: exact runs (docs/exact.md). What tensor
parallelism does differently is in `exact_tensor`."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from glm_core import ops
from glm_core.config import RunConfig
from glm_core.distributed import apply, exact_tensor, schedule
from glm_core.distributed.collectives import all_reduce
from glm_core.distributed.exact_tensor import gathered
from glm_core.distributed.fsdp import whole
from glm_core.distributed.layout import Place, is_expert, joined, splits_of
from glm_core.distributed.parallel import ManyProcesses, messages
from glm_core.distributed.pipeline import Stage
from glm_core.distributed.plan import Plan, at_both_ends
from glm_core.errors import ConfigError
from glm_core.training.batches import Batch
from glm_core.training.optimizer import assign_gradient, sum_in_float32
from glm_core.training.row_tree import RowTree, norm_of_all, tree_sum
from glm_core.versions import torch_has

ENDS = 1
"""tag of the messages between both ends of a pipeline; torch's schedules use 0"""


class ExactProcesses(ManyProcesses):
    """Processes that add the gradients of single sequences by the tree of one process. Without
    ZeRO a data-parallel rank sums a subtree, neighbouring sequences, and the ranks are its next
    leaves. With ZeRO or ep the ranks take turns: neighbouring sequences lie on neighbouring ranks,
    which add them first, so that a rank never holds more than its shard of a sum."""

    def __init__(self, config: RunConfig, plan: Plan, *args: Any) -> None:
        """Takes the arguments of ManyProcesses. Raises ConfigError for a plan that cannot keep the
        tree."""
        _require_order(config, plan)
        super().__init__(config, plan, *args)
        sum_in_float32(self.model)
        # what else is added to one sequence's gradients must not find two sequences' there
        self._trees = {
            stage: RowTree(stage, pairs=not (self._takes_turns or self._shared(stage)))
            for stage in self.model.stages
        }
        self._shapes = apply.whole_shapes(config.model)
        self._sent: deque[tuple[Any, Tensor]] = deque()
        for stage in self.model.stages:
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    # torch's type of it is private
                    module.set_custom_reduce_scatter(TreeReduceScatter())  # type: ignore[arg-type]

    def forward_backward(self, batch: Batch, token_weight: Tensor) -> Tensor:
        """Without ZeRO, what tensor-parallel ranks need of each other's weights travels once."""
        with nullcontext() if self.plan.zero else exact_tensor.keeping_parts():
            return super().forward_backward(batch, token_weight)

    def _work(self) -> schedule.Work:
        """Each sequence is a micro-batch. ZeRO 1, too, reduces gradients after each: they could
        only wait as one sum."""
        rows = self.config.train.global_batch // self.plan.dp
        plan = dataclasses.replace(self.plan, micro_batches=rows)
        parts = (self.mesh, self.config.model, self.device, self.dtype)
        return schedule.Work(self.model.stages, plan, *parts, self._add)

    @property
    def _takes_turns(self) -> bool:
        """Whether neighbouring sequences lie on neighbouring ranks, which add them first."""
        return self.plan.zero > 0 or self.plan.ep > 1

    def _rows(self, tokens: Tensor) -> slice:
        if not self._takes_turns:
            return super()._rows(tokens)
        return slice(self.mesh.get_local_rank("dp"), None, self.plan.dp)

    def _add(self, stage: Stage) -> None:
        """Adds a sequence's gradients to its stage's tree."""
        for weight in self._shared(stage):
            self._join_ends(weight, stage.is_first)
        if self._takes_turns and not self.plan.zero:
            self._sum_ranks(stage)
        self._trees[stage].add()

    def _sum_ranks(self, module: nn.Module) -> None:
        """Adds the data-parallel ranks' gradients up."""
        grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        for group, own in self._copies(grads):
            _add_ranks(own, group)

    def _shared(self, stage: Stage) -> list[nn.Parameter]:
        """Returns the stage's parameters that another process holds as well, at the other end."""
        if self.ends is None:
            return []
        own = (getattr(stage, name) for name in at_both_ends(self.config.model))
        return [weight for weight in own if weight is not None]

    def _join_ends(self, weight: nn.Parameter, is_first: bool) -> None:
        """Sends the last stage's share in the gradient of an embedding to the first stage: one
        process adds both shares of a sequence before it adds sequences."""
        first, last = dist.get_process_group_ranks(self.ends)
        assert weight.grad is not None
        if is_first:
            share = torch.empty_like(weight.grad)
            dist.recv(share, last, self.ends, ENDS)
            weight.grad += share
            return
        while len(self._sent) >= self.plan.pp:  # no more than the pipeline holds up
            self._sent.popleft()[0].wait()
        self._sent.append((dist.isend(weight.grad, first, self.ends, ENDS), weight.grad))
        weight.grad = None

    def sum_gradients(self) -> None:
        for tree in self._trees.values():
            tree.finish()
        for stage in self.model.stages:
            for weight in self._shared(stage):
                self._return(weight)
        if self.plan.dp > 1 and not self._takes_turns:
            self._sum_ranks(self.model)

    def _return(self, weight: nn.Parameter) -> None:
        """Sends the sum of an embedding's gradient back to the last stage."""
        while self._sent:
            self._sent.popleft()[0].wait()
        if weight.grad is None:
            assign_gradient(weight, torch.empty_like(weight, dtype=torch.float32))
        assert weight.grad is not None
        dist.broadcast(weight.grad, dist.get_process_group_ranks(self.ends)[0], self.ends)

    def sum_loss(self, loss: Tensor) -> Tensor:
        """Returns the sum over all sequences, by the tree."""
        rows = self.work.plan.micro_batches
        losses = torch.stack(self.work.losses) if self.work.losses else loss.new_zeros(rows)
        if self.plan.pp > 1:
            losses = all_reduce(losses, self.mesh.get_group("pp"))  # the other stages add zeros
        every = gathered(losses, self.mesh.get_group("dp"))
        ranks = torch.stack(every, 1 if self._takes_turns else 0)
        return tree_sum(ranks.flatten())

    def norm(self, grads: dict[str, Tensor]) -> Tensor:
        """Gathers one gradient after the other where it is cut: the norm of each is that of one
        process."""
        norms = {name: torch.zeros(()) for name in self._shapes}
        for name, p in self.model.named_parameters():
            both = name in at_both_ends(self.config.model)
            if name in grads and (not both or self.model.stages[0].is_first):
                norms[name] = ops.global_norm([self._whole(name, p.grad)])
        values = torch.stack(list(norms.values()))
        if self.plan.pp > 1:
            values = all_reduce(values, self.mesh.get_group("pp"))
        return norm_of_all(values)

    def _whole(self, name: str, grad: Any) -> Tensor:
        """Returns all of a gradient that ZeRO and tensor parallelism may have cut."""
        part: Tensor = whole(grad) if isinstance(grad, DTensor) else grad
        if self.experts is not None and is_expert(name):
            group, axis, ranks = self.experts.get_group("ep"), "ep", self.plan.ep
        else:
            group, axis, ranks = self.mesh.get_group("tp"), "tp", self.plan.tp
        places = [Place(**{axis: ranks, f"{axis}_rank": rank}) for rank in range(ranks)]
        splits = [splits_of(name, self.config.model, place) for place in places]
        return joined(gathered(part, group), splits, self._shapes[name]) if splits[0] else part


class TreeReduceScatter:
    """Sums FSDP's gradients over the ranks: neighbours first, then pairs of neighbours. See torch's
    FSDPModule.set_custom_reduce_scatter."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)
        output_tensor.copy_(tree_sum(parts.chunk(group.size())))


def _require_order(config: RunConfig, plan: Plan) -> None:
    """Raises ConfigError for a plan whose sums have another order than one process's."""
    t, model, label = config.train, config.model, plan.label()
    low, shared = t.dtype != "float32", at_both_ends(model)
    owner = "a tied head's" if model.tied_head else "the embedding's"
    obstacles = (
        (
            plan.ep > 1 and low,
            "ep adds an expert's gradients in the dtype of training; use dtype float32",
        ),
        (
            plan.sp and model.positions == "learned_2d",
            "sp cuts a position table's gradient; use sp=false",
        ),
        (
            plan.tp > 1
            and (model.qk_norm or model.kv_latent or model.num_experts or model.num_mtp_layers),
            "tp cuts sums over heads, latents or an expert's features; use tp=1",
        ),
        (
            model.hidden % plan.tp > 0,
            f"tp={plan.tp} does not divide hidden={model.hidden}; use tp=1",
        ),
        (
            plan.schedule in ("zero-bubble", "zbv"),
            f"schedule={plan.schedule} computes the weights' gradients apart; use 1f1b, gpipe or "
            "interleaved",
        ),
        (
            shared and low and not _joins_tied(plan),
            f"{owner} gradient has two parts, which torch does not add in float32; use dtype "
            "float32, or one process",
        ),
        (
            shared and plan.pp > 1 and plan.zero,
            f"ZeRO adds {owner} gradients over ranks before the pipeline's ends add theirs; "
            "use pp=1 or zero=0",
        ),
        (
            plan.pp > 1 and model.num_experts and model.balance_weight,
            "the experts' auxiliary loss is added stage by stage; use pp=1 or balance_weight=0",
        ),
    )
    if broken := [fact for is_there, fact in obstacles if is_there]:
        raise ConfigError(
            f"plan {label}: train.exact=True: {'; '.join(broken)}, or leave exact out"
        )
    each = 1 if plan.zero or plan.ep > 1 else t.global_batch // plan.dp
    if t.ramp_from or plan.dp & (plan.dp - 1) or (plan.dp > 1 and each & (each - 1)):
        raise ConfigError(
            f"plan {label}: train.exact=True adds {t.global_batch} sequences by a binary tree, "
            f"which dp={plan.dp} cuts only where dp and global_batch / dp are powers of 2 and "
            "do not grow; change them"
        )


def _joins_tied(plan: Plan) -> bool:
    """Returns whether the two parts of a tied embedding's gradient, in a lower precision, are added
    as one process adds them: FSDP adds them before they are float32, and so does torch without
    `grad_dtype` in one process."""
    return not plan.zero if torch_has("grad_dtype") else plan.pp == 1


def _add_ranks(tensors: list[Tensor], group: Any) -> None:
    """Adds the tensors up over the ranks, in place."""
    for parts in messages(tensors):
        sizes = [len(part) for part in parts]
        summed = tree_sum(gathered(torch.cat(parts), group))
        for part, values in zip(parts, summed.split(sizes), strict=True):
            part.copy_(values)
