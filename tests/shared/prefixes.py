"""Offers batches for a model with a prefix (P-Tuning v2), and its attention written out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from toy import V

from glm_core import ops
from glm_core.model.glm import GLM

P, B, L = 3, 4, 12


def batch() -> dict[str, Tensor]:
    """Returns four rows as the sampler makes them: prefix-LM; three packed samples; left pads; two
    samples and right pads that see only themselves."""
    i = torch.arange(L)
    start, end = torch.zeros(B, L, dtype=torch.long), (i + 1).repeat(B, 1)
    end[0] = end[0].clamp(min=5)
    start[1, 4:], start[1, 9:] = 4, 9
    end[1, 4:] = end[1, 4:].clamp(min=7)
    start[2] = 2
    start[3, 5:9], start[3, 9:] = 5, i[9:]
    tokens = torch.randint(V, (B, L), generator=torch.Generator().manual_seed(4))
    positions = torch.stack((i - start, (i - start) // 2), 1)
    return {
        "tokens": tokens,
        "positions": positions.clamp(min=0),
        "key_start": start.int(),
        "key_end": end.int(),
    }


def written_out(glm: GLM, inputs: dict[str, Tensor], table: Tensor | None = None) -> Tensor:
    """Computes the same model with attention as a softmax over [prefix, keys] under a boolean
    mask."""
    table = glm.get_parameter("prefix.table").detach() if table is None else table
    plain = GLM(glm.config).double()
    plain.load_state_dict({k: v for k, v in glm.state_dict().items() if "prefix" not in k})
    keys = torch.arange(L)
    seen = (keys >= inputs["key_start"][..., None]) & (keys < inputs["key_end"][..., None])
    seen = torch.cat((torch.ones(B, L, P, dtype=torch.bool), seen), -1)[:, None]
    c = glm.config

    def forward(i: int) -> Any:
        attention = plain.blocks[i].attention
        front = table.view(P, 2 * c.num_layers, c.num_kv_heads, c.head_dim)

        def run(x: Tensor, rotary: tuple[Tensor, Tensor], *_: Any) -> Tensor:
            qkv = attention.qkv(x).unflatten(-1, (-1, c.head_dim))
            q, k, v = qkv.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), 2)
            q, k = (ops.rope(t, *rotary, c.rope_interleaved) for t in (q, k))
            k, v = (
                torch.cat((front[:, 2 * i + j].expand(B, -1, -1, -1), t), 1)
                for j, t in enumerate((k, v))
            )
            k, v = (t.repeat_interleave(c.num_heads // c.num_kv_heads, 2) for t in (k, v))
            scores = torch.einsum("blhe,bshe->bhls", q, k) / math.sqrt(c.head_dim)
            share = scores.masked_fill(~seen, -math.inf).softmax(-1)
            return attention.out(torch.einsum("bhls,bshe->blhe", share, v).flatten(2))

        return run

    for i in range(c.num_layers):
        plain.blocks[i].attention.forward = forward(i)  # type: ignore[method-assign]  # replaced on purpose
    return plain.logits(**inputs)
