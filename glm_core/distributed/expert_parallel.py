"""Splits the experts of a sparse layer over ranks: whole experts over an expert-parallel group,
whose ranks have different tokens, and each expert's inner width over a tensor-parallel group.

A token's row travels to the rank that holds its expert, and back. No row is dropped: there is no
capacity, and ranks receive different numbers of rows. Shapes: M rows of this rank's tokens, sorted
by expert; m rows received; X experts of the model, r ranks, X/r experts of a rank; D width."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.distributed import ProcessGroup

from glm_core import dispatch, ops
from glm_core.distributed import collectives
from glm_core.distributed.exact_tensor import copies
from glm_core.distributed.tensor_parallel import Ranks, share_mlp
from glm_core.model.glm import Experts, GroupedLinear


class SplitExperts(Experts):
    """The feed-forward part of a sparse layer of which a rank holds some of the experts, or some
    features of each."""

    def __init__(
        self,
        whole: Experts,
        ranks: Ranks | None,
        group: ProcessGroup | None,
        padding: int = 0,
    ) -> None:
        """whole: of the rank's features, all experts. ranks: the tensor-parallel group. group: the
        expert-parallel one. padding: places at the end of every sequence that no expert gets."""
        nn.Module.__init__(self)
        self.padding = padding
        self.config, self.activation = whole.config, whole.activation
        self.ranks, self.group = ranks, group
        self.router = whole.router
        self.experts_up = _own(whole.experts_up, group)
        self.experts_down = _own(whole.experts_down, group)
        self.shared = whole.shared
        if self.shared is not None and ranks is not None:
            share_mlp(self.shared, ranks)

    def routed(self, x: Tensor) -> Tensor:
        """Does as Experts.routed; where the features are split over ranks, their results are
        summed, and so the router's gradient is a rank's share. Every rank computes the auxiliary
        loss whole, and takes its share of the gradient."""
        if self.ranks is None:
            return super().routed(x)
        whole = self.ranks.enter(x)  # [B, L, D]
        y = super().routed(whole[:, : whole.shape[1] - self.padding])
        if self.padding:
            y = nn.functional.pad(y, (0, 0, 0, self.padding))
        y = self.ranks.leave(y)
        if self.balance is not None:
            share = self.balance / self.ranks.size
            self.balance = share + (self.balance - share).detach()
        return y

    def of_rows(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Does as Experts.of_rows, wherever the experts are."""
        if self.group is None:
            return super().of_rows(rows, counts)
        return _dispatched(rows, counts, self.group, super().of_rows)


class OwnExperts(GroupedLinear):
    """A rank's experts. Exact runs keep apart what comes from different ranks: one process sums a
    weight's gradient over the rows of one sequence, and then adds sequences."""

    def __init__(self, whole: GroupedLinear, ranks: int) -> None:
        """Keeps the first X/r experts of a module without memory."""
        nn.Module.__init__(self)
        assert whole.weight.is_meta
        self.weight = nn.Parameter(torch.empty_like(whole.weight[: len(whole.weight) // ranks]))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Does as GroupedLinear; or, with counts [r, X/r], to the rows of each rank."""
        if counts.ndim == 1:
            return super().forward(rows, counts)
        weights = copies(self.weight, len(counts))
        parts = zip(rows.split(counts.sum(1).tolist()), weights, counts, strict=True)
        return torch.cat([ops.grouped_linear(*part) for part in parts])


def _own(experts: GroupedLinear, group: ProcessGroup | None) -> GroupedLinear:
    return experts if group is None else OwnExperts(experts, group.size())


def _dispatched(
    rows: Tensor,
    counts: Tensor,
    group: ProcessGroup,
    compute: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Returns what the experts of all ranks make of this rank's rows, in their order;  rows [M, D],
    counts [X] -> [M, D]. Rank i holds experts i X/r ... (i + 1) X/r - 1, which `compute` applies.
    The rows of an expert are in the order of the ranks they come from, as one process has them.
    Exact: `compute` gets each rank's rows and counts [r, X/r]."""
    sent = counts.unflatten(0, (group.size(), -1))  # [r, X/r]
    ones = [1] * group.size()
    arrived = collectives.all_to_all(sent, ones, ones, group)  # [r, X/r], from each rank
    num_sent, num_arrived = _sizes(sent, rows), _sizes(arrived, rows)
    here = collectives.exchange(rows, num_arrived, num_sent, group)  # [m, D]
    if dispatch.session().exact:
        return collectives.exchange(compute(here, arrived), num_sent, num_arrived, group)
    own = sent.shape[1]
    expert = (
        torch.arange(own, device=rows.device)
        .repeat(group.size())
        .repeat_interleave(arrived.flatten(), output_size=len(here))
    )  # [m]
    by_expert, order, num_rows = ops.permute(here, expert[:, None], own)
    y = compute(by_expert, num_rows)
    once = torch.ones(len(here), 1, device=rows.device)  # exact: each row is a token of one choice
    return collectives.exchange(ops.unpermute(y, order, once), num_sent, num_arrived, group)


def _sizes(counts: Tensor, rows: Tensor) -> list[int]:
    """Returns the number of rows for each rank;  counts [r, X/r]. Without values, as in a dry run,
    every rank sends as many rows to each."""
    if is_fake(counts):
        return [len(part) for part in rows.tensor_split(len(counts))]
    return counts.sum(1).tolist()
