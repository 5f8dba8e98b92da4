"""Two small models with experts and a layer of multi-token prediction: with grouped-query attention
and with latent attention."""

from __future__ import annotations

import dataclasses

from glm_core.model.presets import preset

SMALL = dataclasses.replace(
    preset("tiny-moe"), num_layers=2, hidden=32, ffn=32, expert_ffn=32, vocab=64, max_length=32
)
LATENT = dataclasses.replace(
    SMALL,
    num_kv_heads=4,
    head_dim=24,
    qk_norm=False,
    rope_fraction=1.0,
    kv_latent=32,
    q_latent=32,
    rope_head_dim=8,
    value_head_dim=16,
)
BOTH = (SMALL, LATENT)
