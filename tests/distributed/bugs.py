"""Mistakes that parallel training is known for, planted one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from glm_core import ops
from glm_core.distributed import layout, parallel, pipeline, tensor_parallel, vocabulary
from glm_core.distributed.parallel import ManyProcesses

Bug = Callable[[], AbstractContextManager[Any]]


def mean_over_ranks() -> AbstractContextManager[Any]:
    """Data parallel averages gradients that are already relative to the global batch."""
    right = parallel.add_up

    def wrong(grads: list[Tensor], group: Any) -> None:
        right(grads, group)
        for g in grads:
            g /= group.size()

    return mock.patch.object(parallel, "add_up", wrong)


def mean_per_rank() -> AbstractContextManager[Any]:
    """Each rank divides by its own tokens, as DDP scripts do; rows weigh differently."""
    right = ManyProcesses.forward_backward

    def wrong(self: ManyProcesses, batch: Any, token_weight: Tensor) -> Tensor:
        weight, each = token_weight.clone(), len(batch.tokens) // self.plan.dp
        for part in weight.split(each):
            part *= weight.sum() / part.sum() / self.plan.dp
        return right(self, batch, weight)

    return mock.patch.object(ManyProcesses, "forward_backward", wrong)


def same_rows() -> AbstractContextManager[Any]:
    """Every data-parallel rank reads the first rank's rows."""
    return mock.patch.object(
        ManyProcesses, "_rows", lambda self, tokens: slice(0, len(tokens) // self.plan.dp)
    )


def bias_per_rank() -> AbstractContextManager[Any]:
    """The bias of a row-parallel product is added before the sum, once per rank."""

    def wrong(self: tensor_parallel.RowLinear, x: Tensor) -> Tensor:
        return self.ranks.leave(ops.linear(x, self.weight, self.bias))

    return mock.patch.object(tensor_parallel.RowLinear, "forward", wrong)


@contextmanager
def alpha_of_the_stage() -> Iterator[None]:
    """DeepNorm's alpha counts the layers of the stage."""
    right = pipeline.Stage.__init__

    def wrong(self: pipeline.Stage, *args: Any) -> None:
        right(self, *args)
        for block in self.own_blocks():
            block.alpha = math.sqrt(2 * len(self.blocks))

    with mock.patch.object(pipeline.Stage, "__init__", wrong):
        yield


def norms_not_summed() -> AbstractContextManager[Any]:
    """Under sequence parallelism each rank keeps its tokens' share of a norm's gradient."""
    return mock.patch.object(parallel, "replicated", return_value=False)


def halves_cut_together() -> AbstractContextManager[Any]:
    """The two halves of a gated feed-forward are cut as if they were one matrix."""
    right = layout.split_of

    def wrong(name: str, config: Any, tp: int, rank: int) -> Any:
        split = right(name, config, tp, rank)
        if ".up." in name and split is not None:
            return layout.Split(0, ((rank * split.length, split.length),))
        return split

    return mock.patch.object(layout, "split_of", wrong)


def own_logsumexp() -> AbstractContextManager[Any]:
    """Each rank normalises over its own rows of the vocabulary."""
    right = vocabulary.all_gather

    def wrong(x: Tensor, group: Any, dim: int) -> Tensor:
        every = right(x, group, dim)
        every[:, 0] = torch.where(
            torch.arange(len(every))[:, None] == group.rank(), x[0, 0], -math.inf
        )
        return every

    return mock.patch.object(vocabulary, "all_gather", wrong)


def ends_apart() -> AbstractContextManager[Any]:
    """First and last stage keep their own gradients of the tied embedding."""
    return mock.patch.object(parallel.meshes, "ends_group", return_value=None)


def zero_averages() -> AbstractContextManager[Any]:
    """FSDP2's default: the mean over ranks."""
    real = FSDPModule.set_gradient_divide_factor
    return mock.patch.object(
        FSDPModule, "set_gradient_divide_factor", lambda self, _: real(self, 2.0)
    )


def norm_of_a_part() -> AbstractContextManager[Any]:
    """Each process clips by the norm of what it holds."""
    return mock.patch.object(
        ManyProcesses, "norm", lambda self, grads: ops.global_norm(list(grads.values()))
    )


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
    )
}
