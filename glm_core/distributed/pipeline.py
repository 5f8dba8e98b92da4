"""What a pipeline stage holds and when it works: some layers of the one model, in one of
torch.distributed.pipelining's schedules. A model that is not cut is a single stage.

Two tensors travel from stage to stage, `delta` and `residual`, as between any two blocks (see
model/glm.py): not their sum, which the next norm forms in its fused op. Shapes as there; under
sequence parallelism [B, L/t, D] travels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glm_core import dispatch, ops
from glm_core.config import ModelConfig
from glm_core.distributed import tensor_parallel as tensor
from glm_core.distributed.plan import Recompute, stage_layers
from glm_core.distributed.tensor_parallel import Ranks
from glm_core.model.glm import GLM, Block, residual_scale, rotary_angles


class Stage(nn.Module):
    """Layers [first, last) of a GLM, the embedding before the first, norm, head and loss after the
    last. Parameters have the names of the whole model, and are uninitialised, on the meta
    device."""

    def __init__(
        self, config: ModelConfig, number: int, stages: int, ranks: Ranks | None = None
    ) -> None:
        """config: of the whole model. ranks: the tensor-parallel group, where there is one."""
        super().__init__()
        self.config, self.ranks = config, ranks
        self.is_first, self.is_last = number == 0, number == stages - 1
        with torch.device("meta"):
            # DeepNorm's alpha and the layer scale of the scores count all layers: built from the
            # whole, then cut
            whole = GLM(tensor.part_of(config, ranks.size) if ranks else config)
        held = {str(i): whole.blocks[i] for i in stage_layers(config.num_layers, stages)[number]}
        self.blocks = nn.ModuleDict(held)
        if self.is_first:
            self.position_embedding = whole.position_embedding
            self.block_embedding = whole.block_embedding
        if self.is_first or (self.is_last and config.tied_head):
            self.embedding = whole.embedding
        if self.is_last:
            self.final_norm = whole.final_norm
            if whole.head is not None:
                self.head = whole.head
        if ranks:
            for block in self.layers():
                tensor.share(block, ranks)
        self.run: Callable[..., tuple[Tensor, Tensor]] = lambda block, *args: block(*args)

    def layers(self) -> list[Block]:
        """The blocks in order."""
        return [b for b in self.blocks.values() if isinstance(b, Block)]

    def recompute(self, what: Recompute) -> None:
        """What is computed again in the backward pass rather than kept: whole blocks ("full"), or
        attention's core ("selective")."""
        if what == "full":
            self.run = functools.partial(again, _call)
        elif what == "selective":
            for block in self.layers():
                block.attention.core = functools.partial(again, ops.attention)

    def forward(
        self,
        *carried: Tensor,
        positions: Tensor,
        key_start: Tensor,
        key_end: Tensor,
        labels: Tensor,
        token_weight: Tensor,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """carried: the tokens on the first stage, delta and residual on the others -> delta and
        residual, on the last stage the micro-batch's sum(token_weight * cross-entropy) as [1].
        Every other tensor is the whole micro-batch's, on every stage; shapes as in GLM.loss."""
        delta: Tensor | None = None
        if self.is_first:
            x = self.embed(carried[0], positions)
        else:
            delta, x = carried
        learned = self.config.positions == "learned_2d"
        rotary = None if learned else rotary_angles(self.config, positions)
        for block in self.blocks.values():
            delta, x = self.run(block, delta, x, rotary, key_start, key_end)
        assert delta is not None  # no stage is empty
        if not self.is_last:
            return own_storage(delta), own_storage(x)
        hidden = self.final_norm.add(delta, x, residual_scale(self.config))[0]
        return self.loss(hidden, labels, token_weight)[None]

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """As GLM.embed."""
        shrink = self.config.embedding_gradient_shrink
        if self.ranks is None:
            x: Tensor = ops.embedding(tokens, self.embedding, shrink)
        else:
            x = tensor.embed(tokens, self.embedding, shrink, self.ranks)
        for row, table in enumerate((self.position_embedding, self.block_embedding)):
            if table is not None:
                own = tensor.own_tokens(positions[:, row], self.ranks)
                x = x + ops.embedding(own, table)
        return x

    def loss(self, hidden: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
        """As the end of GLM.loss."""
        head = self.embedding if self.config.tied_head else self.head
        if self.ranks is None:
            return ops.linear_cross_entropy(
                hidden.flatten(0, 1), head, labels.flatten(), token_weight.flatten()
            )
        return tensor.loss(hidden, head, labels, token_weight, self.ranks)


def own_storage(x: Tensor) -> Tensor:
    """x, copied if it is a view: torch's zero-bubble schedules detach what a stage returns in
    place (torch 2.13, pipelining/_backward.py), which views refuse."""
    return x.clone() if x._is_view() else x


def _call(block: Block, *args: Any) -> tuple[Tensor, Tensor]:
    return block(*args)


def again(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), of which nothing but the arguments is kept for the backward pass; computed
    again there on the same backend."""
    session = dispatch.session()
    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (dispatch.resume(session), dispatch.resume(session)),
    )
