"""Plants the mistakes that parallel training is known for, one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from glm_core import ops
from glm_core.distributed import (
    collectives,
    layout,
    mesh,
    parallel,
    pipeline,
    tensor_parallel,
    vocabulary,
)
from glm_core.distributed.collectives import all_gather
from glm_core.distributed.parallel import ManyProcesses
from glm_core.training.optimizer import Optimizer, own_part

Bug = Callable[[], AbstractContextManager[Any]]


def mean_over_ranks() -> AbstractContextManager[Any]:
    """Averages gradients over ranks that are already relative to the global batch."""
    right = parallel.add_up

    def wrong(grads: list[Tensor], group: Any) -> None:
        right(grads, group)
        for g in grads:
            g /= group.size()

    return mock.patch.object(parallel, "add_up", wrong)


def mean_per_rank() -> AbstractContextManager[Any]:
    """Divides on each rank by its own tokens, as DDP scripts do; rows weigh differently."""
    right = ManyProcesses.forward_backward

    def wrong(self: ManyProcesses, batch: Any, token_weight: Tensor) -> Tensor:
        weight, each = token_weight.clone(), len(batch.tokens) // self.plan.dp
        for part in weight.split(each):
            part *= weight.sum() / part.sum() / self.plan.dp
        return right(self, batch, weight)

    return mock.patch.object(ManyProcesses, "forward_backward", wrong)


def same_rows() -> AbstractContextManager[Any]:
    """Gives every data-parallel rank the first rank's rows."""
    return mock.patch.object(
        ManyProcesses, "_rows", lambda self, tokens: slice(0, len(tokens) // self.plan.dp)
    )


def bias_per_rank() -> AbstractContextManager[Any]:
    """Adds the bias of a row-parallel product before the sum, once per rank."""

    def wrong(self: tensor_parallel.RowLinear, x: Tensor) -> Tensor:
        return self.ranks.leave(ops.linear(x, self.weight, self.bias))

    return mock.patch.object(tensor_parallel.RowLinear, "forward", wrong)


@contextmanager
def alpha_of_the_stage() -> Iterator[None]:
    """Takes DeepNorm's alpha of the stage's layers alone."""
    right = pipeline.Stage.__init__

    def wrong(self: pipeline.Stage, *args: Any) -> None:
        right(self, *args)
        for block in self.own_blocks():
            block.alpha = math.sqrt(2 * len(self.blocks))

    with mock.patch.object(pipeline.Stage, "__init__", wrong):
        yield


def norms_not_summed() -> AbstractContextManager[Any]:
    """Leaves each rank its tokens' share of a norm's gradient under sequence parallelism."""
    return mock.patch.object(parallel, "replicated", return_value=False)


def halves_cut_together() -> AbstractContextManager[Any]:
    """Cuts the two halves of a gated feed-forward as if they were one matrix."""
    right = layout.splits_of

    def wrong(name: str, config: Any, place: layout.Place) -> Any:
        splits = right(name, config, place)
        if ".up." in name and splits:
            [split] = splits
            length = sum(length for _, length in split.spans)
            return (layout.Split(0, ((place.tp_rank * length, length),), split.ranks),)
        return splits

    return mock.patch.object(layout, "splits_of", wrong)


def own_logsumexp() -> AbstractContextManager[Any]:
    """Normalises on each rank over its own rows of the vocabulary."""

    def wrong(x: Tensor, group: Any, dim: int) -> Tensor:
        every = all_gather(x, group, dim)
        every[:, 0] = torch.where(
            torch.arange(len(every))[:, None] == group.rank(), x[0, 0], -math.inf
        )
        return every

    return mock.patch.object(vocabulary, "all_gather", wrong)


def ends_apart() -> AbstractContextManager[Any]:
    """Leaves first and last stage their own gradients of the embedding that both hold."""
    return mock.patch.object(mesh, "ends_group", return_value=None)


def zero_averages() -> AbstractContextManager[Any]:
    """Takes FSDP2's default, the mean over ranks."""
    real = FSDPModule.set_gradient_divide_factor
    return mock.patch.object(
        FSDPModule, "set_gradient_divide_factor", lambda self, _: real(self, 2.0)
    )


def norm_of_a_part() -> AbstractContextManager[Any]:
    """Clips in each process by the norm of what it holds."""
    return mock.patch.object(
        ManyProcesses, "norm", lambda self, grads: ops.global_norm(list(grads.values()))
    )


def rounded_sums() -> AbstractContextManager[Any]:
    """Sums gradients over ranks in bfloat16."""
    right = parallel.add_up

    def wrong(grads: list[Tensor], group: Any) -> None:
        for g in grads:
            g.copy_(g.bfloat16())
        right(grads, group)
        for g in grads:
            g.copy_(g.bfloat16())

    return mock.patch.object(parallel, "add_up", wrong)


def last_gradient_not_summed() -> AbstractContextManager[Any]:
    """Drops the last parameter from the messages that sum gradients."""
    right = parallel.add_up
    return mock.patch.object(parallel, "add_up", lambda grads, group: right(grads[:-1], group))


def gradients_not_summed() -> AbstractContextManager[Any]:
    """Never sums gradients over ranks."""
    return mock.patch.object(parallel, "add_up", return_value=None)


def copies_count_twice() -> AbstractContextManager[Any]:
    """Counts in the norm what several ranks hold as often as it is held."""
    return mock.patch.object(ManyProcesses, "_counts", return_value=True)


def shard_not_updated() -> AbstractContextManager[Any]:
    """Leaves the second rank's shard as it was."""
    right = Optimizer._update

    def wrong(self: Optimizer, *args: Any) -> None:
        if dist.get_rank() != 1:
            right(self, *args)

    return mock.patch.object(Optimizer, "_update", wrong)


def stale_parameters() -> AbstractContextManager[Any]:
    """Computes the first block with the weights of the step before."""
    right = ManyProcesses.forward_backward
    before: dict[str, Tensor] = {}

    def wrong(self: ManyProcesses, batch: Any, token_weight: Tensor) -> Tensor:
        block = {n: own_part(p) for n, p in self.model.named_parameters() if "blocks.0." in n}
        now = {n: p.detach().clone() for n, p in block.items()}
        with torch.no_grad():
            for n, p in block.items():
                p.copy_(before.get(n, p))
        loss = right(self, batch, token_weight)
        with torch.no_grad():
            for n, p in block.items():
                p.copy_(now[n])
        before.update(now)
        return loss

    return mock.patch.object(ManyProcesses, "forward_backward", wrong)


def experts_over_all_ranks() -> AbstractContextManager[Any]:
    """Averages the gradients of experts over all data-parallel ranks, which hold different ones."""

    def wrong(self: ManyProcesses, grads: dict[str, Tensor]) -> Iterator[tuple[Any, list[Tensor]]]:
        group = self.mesh.get_group("dp")
        yield group, list(grads.values())
        for name, grad in grads.items():
            if layout.is_expert(name):
                grad /= group.size()

    return mock.patch.object(ManyProcesses, "_copies", wrong)


def rows_to_the_wrong_rank() -> AbstractContextManager[Any]:
    """Sends what the experts made of the ranks' rows back in the reverse order of the ranks."""
    right, before = collectives.exchange, [0]

    def wrong(x: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
        before[0] += 1
        if before[0] % 2 == 0:  # every second exchange is a way back
            x = torch.cat(x.split(sent)[::-1])
        return right(x, received, sent, group)

    return mock.patch.object(collectives, "exchange", wrong)


def padding_is_learned() -> AbstractContextManager[Any]:
    """Gives the place that sequence parallelism pads for a layer of multi-token prediction the
    weight of the last token."""
    right = pipeline.Stage.one_ahead

    def wrong(self: pipeline.Stage, hidden: Tensor, *of_tokens: Tensor) -> tuple[Tensor, ...]:
        *longer, token_weight = right(self, hidden, *of_tokens)
        return *longer, torch.cat((token_weight[..., :-1], of_tokens[-1][..., -1:]), -1)

    return mock.patch.object(pipeline.Stage, "one_ahead", wrong)


BUGS: dict[str, Bug] = {
    f.__name__: f
    for f in (
        mean_over_ranks,
        mean_per_rank,
        same_rows,
        bias_per_rank,
        alpha_of_the_stage,
        norms_not_summed,
        halves_cut_together,
        own_logsumexp,
        ends_apart,
        zero_averages,
        norm_of_a_part,
        rounded_sums,
        last_gradient_not_summed,
        gradients_not_summed,
        copies_count_twice,
        shard_not_updated,
        stale_parameters,
        experts_over_all_ranks,
        rows_to_the_wrong_rank,
        padding_is_learned,
    )
}
