"""Splits matrices over tensor-parallel ranks without cutting a sum (docs/exact.md).

Where ranks would add up their shares of a product, each rank instead computes some columns of the
result, over the whole depth: the other ranks' factors come to it, weights by one exchange, and the
columns are gathered. What is summed over tokens is computed by every rank for all of them. So every
sum has the length and the order that one process gives it. Shapes: N
tokens, D width, F features of all ranks, V vocabulary, t ranks; S sections of the features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from glm_core import dispatch, ops
from glm_core.distributed.collectives import SEQUENCE, all_gather
from glm_core.model.glm import Norm, normed
from glm_core.training.row_tree import tree_sum

Sections = tuple[int, ...]
"""lengths of a rank's features by section (q, k and v, or both halves of a gated layer): one
process has each section of all ranks before the next section"""

_parts: list[dict[int, Tensor]] = []
"""of the weights, by the address of a rank's own part: inside keeping_parts"""


@contextmanager
def keeping_parts() -> Iterator[None]:
    """Keeps what ranks send each other of the weights in the block, where no weight may change: it
    travels once, not once for each sequence. A rank then holds as much again as its own parts, and
    the whole head."""
    _parts.append({})
    try:
        yield
    finally:
        _parts.pop()


def kept(weight: Tensor, exchange: Callable[[], Tensor]) -> Tensor:
    """Returns what `exchange` returns for this weight."""
    if not _parts:
        return exchange()
    known, key = _parts[-1], weight.data_ptr()
    if key not in known:
        known[key] = exchange()
    return known[key]


def column_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, sections: Sections, group: ProcessGroup
) -> Tensor:
    """Returns this rank's features of a linear layer, [..., D] -> [..., F/t], from x that every
    rank has. The gradient of x is whole, and the same on every rank."""
    y = ops.linear(x.detach(), weight, bias)
    out: Tensor = _ToInput.apply(y, x, weight.detach(), sections, group)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return out


class _ToInput(torch.autograd.Function):
    """Returns y, with the gradient that a column-parallel layer passes on to its input."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, weight: Tensor, sections: Sections, group: ProcessGroup
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.sections, ctx.group, ctx.session = sections, group, dispatch.session()
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        [weight] = ctx.saved_tensors
        whole = _in_order(gathered(grads[0], ctx.group), ctx.sections, -1)  # [..., F]

        def columns() -> Tensor:
            sent = torch.cat(weight.chunk(ctx.group.size(), 1))  # [t F/t, D/t]
            return _in_order(_exchanged(sent, ctx.group), ctx.sections, 0)  # [F, D/t]

        with dispatch.resume(ctx.session), torch.no_grad():
            own = ops.linear(whole, kept(weight, columns).T)  # [..., D/t]
        return grads[0], torch.cat(gathered(own, ctx.group), -1), None, None, None


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup) -> Tensor:
    """Returns a linear layer of which each rank has some features of the input, [..., F/t] ->
    [..., D], the same on every rank."""
    out: Tensor = _Row.apply(x, weight, bias, group)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return out


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.session = dispatch.session()
        whole = torch.cat(gathered(x, group), -1)  # [..., F]
        rows = kept(weight, lambda: torch.cat(_exchanged(weight, group), -1))  # [D/t, F]
        own = None if bias is None else bias.chunk(group.size())[group.rank()]
        return torch.cat(gathered(ops.linear(whole, rows, own), group), -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, bias = ctx.saved_tensors
        dy = grads[0].flatten(0, -2)  # [N, D]
        with dispatch.resume(ctx.session), torch.no_grad():
            dx = ops.linear(grads[0], weight.T)
            dweight = ops.linear(dy.T, x.flatten(0, -2).T)
            dbias = None if bias is None else ops.linear(dy.T, dy.new_ones(1, len(dy)))[:, 0]
        return dx, dweight, dbias, None


class _WholeSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group, SEQUENCE)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _own_tokens(grads[0], ctx.group), None


def whole_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """Gathers a sequence that ranks share, [B, L/t, D] -> [B, L, D]. The gradient is whole, and the
    same on every rank."""
    out: Tensor = _WholeSequence.apply(x, group)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return out


class _OwnTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _own_tokens(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return all_gather(grads[0], ctx.group, SEQUENCE), None


def own_tokens(x: Tensor, group: ProcessGroup) -> Tensor:
    """Returns this rank's part of a sequence that every rank has, [B, L, D] -> [B, L/t, D]."""
    out: Tensor = _OwnTokens.apply(x, group)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return out


def _own_tokens(x: Tensor, group: ProcessGroup) -> Tensor:
    return x.chunk(group.size(), SEQUENCE)[group.rank()].contiguous()


class _ToWeights(torch.autograd.Function):
    """Returns y = op(*inputs, *weights), computed for this rank's tokens, with the gradient that
    the weights get from the whole sequence: the op is computed again for all tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        op: Callable[..., Tensor],
        group: ProcessGroup,
        y: Tensor,
        weights: int,
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.op, ctx.group, ctx.weights, ctx.session = op, group, weights, dispatch.session()
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        saved = ctx.saved_tensors
        weights = [w.detach().requires_grad_() for w in saved[: ctx.weights]]
        inputs = [
            None if x is None else all_gather(x, ctx.group, SEQUENCE) for x in saved[ctx.weights :]
        ]
        with torch.enable_grad(), dispatch.resume(ctx.session):
            y = ctx.op(inputs, weights)
        every = torch.autograd.grad(y, weights, all_gather(grads[0], ctx.group, SEQUENCE))
        return None, None, grads[0], None, *every, *(None for _ in inputs)


class SequenceNorm(Norm):
    """A norm of tokens that ranks share. In exact runs its weights' gradient is summed over the
    whole sequence on every rank, as on one process."""

    def __init__(self, norm: Norm, group: ProcessGroup) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.eps, self.group = norm.weight, norm.bias, norm.eps, group

    def add(self, delta: Tensor | None, residual: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        if not dispatch.session().exact:
            return super().add(delta, residual, alpha)
        weights = [w for w in (self.weight, self.bias) if w is not None]

        def op(inputs: Sequence[Tensor | None], own: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            bias = own[1] if len(own) > 1 else None
            assert inputs[1] is not None
            return normed(inputs[0], inputs[1], alpha, own[0], bias, self.eps)

        inputs = (delta, residual)
        y, total = op(inputs, [w.detach() for w in weights])
        kept = (None if x is None else x.detach() for x in inputs)
        arguments = (lambda *args: op(*args)[0], self.group, y, len(weights), *weights, *kept)
        out: Tensor = _ToWeights.apply(*arguments)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        return out, total


def loss(
    hidden: Tensor, head: Tensor, labels: Tensor, token_weight: Tensor, group: ProcessGroup
) -> Tensor:
    """Computes ops.linear_cross_entropy whole on every rank, with the head's rows of all ranks;
    hidden [B, L, D], head [V/t, D], labels and token_weight [B, L] -> float32 scalar."""
    whole: Tensor = _Rows.apply(head, group)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return ops.linear_cross_entropy(
        hidden.flatten(0, 1), whole, labels.flatten(), token_weight.flatten()
    )


class _Rows(torch.autograd.Function):
    """Gathers the rows of a matrix; every rank's gradient is that of all."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return kept(own, lambda: all_gather(own, group, 0)).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].chunk(ctx.group.size())[ctx.group.rank()], None


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, number: int) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for _ in range(number))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return tree_sum(grad.clone() for grad in grads), None


def copies(x: Tensor, number: int) -> tuple[Tensor, ...]:
    """Returns x a power of 2 of times, whose gradients are added by a tree."""
    every: tuple[Tensor, ...] = _Copies.apply(x, number)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return every


def gathered(x: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Returns every rank's tensor."""
    return list(all_gather(x, group, 0).chunk(group.size()))


def _exchanged(x: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Sends rank i the i-th of t parts of the rows, and returns what the ranks sent here."""
    sent = x.contiguous()
    arrived = torch.empty_like(sent)
    dist.all_to_all_single(arrived, sent, group=group)
    return list(arrived.chunk(group.size()))


def _in_order(parts: list[Tensor], sections: Sections, dim: int) -> Tensor:
    """Joins the ranks' features, along `dim`, as one process has them."""
    cut = [part.split_with_sizes(sections, dim) for part in parts]
    return torch.cat([part[s] for s in range(len(sections)) for part in cut], dim)
