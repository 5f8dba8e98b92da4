"""A pipeline stage: the one model with some of its layers left out. A model that is not cut is a
single stage.

Two tensors travel from stage to stage, `delta` and `residual`, as between any two blocks (see
model/glm.py): not their sum, which the next norm forms in its fused op. Shapes as there; under
sequence parallelism [B, L/t, D] travels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from glm_core import dispatch, ops
from glm_core.config import ModelConfig
from glm_core.distributed import tensor_parallel as tensor
from glm_core.distributed.exact_tensor import SequenceNorm
from glm_core.distributed.expert_parallel import SplitExperts
from glm_core.distributed.plan import EMBEDDINGS, Recompute, at_both_ends, stage_layers
from glm_core.distributed.tensor_parallel import Ranks
from glm_core.model.glm import GLM, Block, Experts, NextToken, Stream


class Stage(GLM):
    """A GLM with some of its layers. The first stage has the embedding. The last has norm, head,
    loss, layers of multi-token prediction, and a copy of what these need of the embedding
    (`plan.at_both_ends`). Parameters have the names of the whole model and are uninitialised, on
    the meta device."""

    own_loss: Tensor | float = 0.0
    """the auxiliary losses of the experts of a stage that is not the last, since they were taken;
    float32"""

    def __init__(
        self,
        config: ModelConfig,
        number: int,
        stages: int,
        ranks: Ranks | None = None,
        experts: ProcessGroup | None = None,
    ) -> None:
        """config: of the whole model. ranks, experts: the tensor- and the expert-parallel group,
        where there is one."""
        with torch.device("meta"):
            # DeepNorm's alpha and the layer scale of the scores count all layers: built from the
            # whole, then cut
            super().__init__(tensor.part_of(config, ranks.size) if ranks else config)
        self.config, self.ranks = config, ranks
        self.is_first, self.is_last = number == 0, number == stages - 1
        self._recompute: Recompute = "none"
        further = config.num_mtp_layers
        layers = [*stage_layers(config.num_layers, stages, further)[number]]
        if self.is_last:
            layers += range(config.num_layers, config.num_layers + further)
        held = {str(i): self.blocks[i] for i in layers}
        self.register_module("blocks", nn.ModuleDict(held))
        own = EMBEDDINGS if self.is_first else at_both_ends(config) if self.is_last else ()
        for table in {*EMBEDDINGS[1:]}.difference(own):
            setattr(self, table, None)
        # behind the position tables: the gradient norm is summed in this order
        embedding = self._parameters.pop("embedding")
        self.register_parameter("embedding", embedding if "embedding" in own else None)
        if not self.is_last:
            self.final_norm = self.head = None
        elif ranks and ranks.sp and self.final_norm is not None:
            self.final_norm = SequenceNorm(self.final_norm, ranks.group)
        for layer, block in zip(layers, self.own_blocks(), strict=True):
            if ranks:
                tensor.share(block, ranks)
            if (ranks or experts) and isinstance(block.mlp, Experts):
                padding = max(0, layer + 1 - config.num_layers) if ranks and ranks.sp else 0
                block.mlp = SplitExperts(block.mlp, ranks, experts, padding)

    def own_blocks(self) -> list[Block]:
        """Returns the stage's blocks in order."""
        return [b for b in self.blocks.children() if isinstance(b, Block)]

    def layers(self) -> list[Callable[..., Stream]]:
        """Returns the blocks as `forward` calls them, computed again in the backward pass or
        not."""
        return self._called([b for b in self.own_blocks() if not isinstance(b, NextToken)])

    def further_layers(self) -> list[Callable[..., Stream]]:
        """Returns the layers of multi-token prediction in the same way."""
        return self._called(super().further_layers())

    def _called(self, blocks: Sequence[Callable[..., Stream]]) -> list[Callable[..., Stream]]:
        if self._recompute == "full":
            return [functools.partial(recomputed, block) for block in blocks]
        return list(blocks)

    def recompute(self, what: Recompute) -> None:
        """Sets what is computed again in the backward pass rather than kept: whole blocks ("full"),
        or attention's core ("selective")."""
        self._recompute = what
        if what == "selective":
            for block in self.own_blocks():
                block.attention.core = functools.partial(recomputed, ops.attention)

    def forward(  # type: ignore[override]  # torch's schedules call a stage with what travels
        self,
        *carried: Tensor,
        tokens: Tensor,
        positions: Tensor,
        key_start: Tensor,
        key_end: Tensor,
        labels: Tensor,
        token_weight: Tensor,
    ) -> Stream | Tensor:
        """Returns delta and residual, on the last stage the loss sum(token_weight * cross-entropy)
        of the micro-batch as [1]. carried: the tokens on the first stage, delta and residual on the
        others. Every stage gets the other tensors whole, and the tokens once more; shapes as in
        GLM.loss."""
        begin = carried[0] if self.is_first else (carried[0], carried[1])
        out = super().forward(begin, positions, key_start, key_end)
        if isinstance(out, Tensor):
            mask = (key_start, key_end)
            return self.loss_of(out, tokens, positions, *mask, labels, token_weight)[None]
        delta, residual = out
        own = self.balanced(token_weight.new_zeros(()), token_weight)
        if own.requires_grad:
            self.own_loss = own.detach() + self.own_loss
            delta = _WithLoss.apply(delta, own)  # type: ignore[no-untyped-call]  # torch's apply
        return own_storage(delta), own_storage(residual)

    def take_own_loss(self) -> Tensor | float:
        """Returns `own_loss`, and begins a new sum."""
        own, self.own_loss = self.own_loss, 0.0
        return own

    def embed(self, tokens: Tensor) -> Tensor:
        """Does as GLM.embed, with a table whose rows the ranks share out."""
        if self.ranks is None:
            return super().embed(tokens)
        shrink = self.config.embedding_gradient_shrink
        return tensor.embed(tokens, self.embedding, shrink, self.ranks)

    def add_positions(self, x: Tensor, positions: Tensor) -> Tensor:
        """Does as GLM.add_positions, to this rank's part of the sequence."""
        return super().add_positions(x, tensor.own_tokens(positions, self.ranks))

    def one_ahead(self, hidden: Tensor, *of_tokens: Tensor) -> tuple[Tensor, ...]:
        """Does as GLM.one_ahead. Where ranks share the sequence it keeps its length, which they
        divide: a place without weight, which no other sees, repeats the last token."""
        if self.ranks is None or not self.ranks.sp:
            return super().one_ahead(hidden, *of_tokens)
        *longer, token_weight = (torch.cat((x, x[..., -1:]), -1) for x in of_tokens)
        token_weight[..., -1] = 0
        return hidden, *super().one_ahead(hidden, *longer, token_weight)[1:]

    def cross_entropy(self, hidden: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
        """Does as GLM.cross_entropy, with a head whose rows the ranks share out."""
        if self.ranks is None:
            return super().cross_entropy(hidden, labels, token_weight)
        return tensor.loss(hidden, self.head_weight, labels, token_weight, self.ranks)


class _WithLoss(torch.autograd.Function):
    """Returns x, whose backward pass also is that of a loss: a stage that is not the last returns
    none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.one = torch.ones_like(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], ctx.one


def own_storage(x: Tensor) -> Tensor:
    """Returns x, copied if it is a view: torch's zero-bubble schedules detach what a stage returns
    in place (torch 2.13, pipelining/_backward.py), which views refuse."""
    return x.clone() if x._is_view() else x


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Returns function(*args) and keeps only the arguments for the backward pass, where the
    function is computed again on the same backend."""
    session = dispatch.session()
    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (dispatch.resume(session), dispatch.resume(session)),
    )
