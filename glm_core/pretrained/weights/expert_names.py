"""Lists the names and config keys of transformers' glm4_moe (GLM-4.5, 4.6, 4.7) and glm4_moe_lite
(GLM-4.7-Flash), in both styles of experts: a tensor each, as published, or one for all of them.

{i} is the layer's number, {p} one of q, k, v, {g} gate or up, {e} the expert's number."""

from __future__ import annotations

from typing import Any

_COMMON = {
    "input_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.out": "self_attn.o_proj",
    "mlp.up": "mlp.{g}_proj",
    "mlp.down": "mlp.down_proj",
    "mlp.shared.up": "mlp.shared_experts.{g}_proj",
    "mlp.shared.down": "mlp.shared_experts.down_proj",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.e_score_correction_bias",
    "embedding_norm": "enorm",
    "hidden_norm": "hnorm",
    "join": "eh_proj",
    "final_norm": "shared_head.norm",
}
_GROUPED = {
    "attention.qkv": "self_attn.{p}_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
}
_LATENT = {
    "attention.q": "self_attn.q_proj",
    "attention.q_a": "self_attn.q_a_proj",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.q_b": "self_attn.q_b_proj",
    "attention.kv_a": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.kv_b": "self_attn.kv_b_proj",
}
_EACH = {
    "mlp.experts_up": "mlp.experts.{e}.{g}_proj",
    "mlp.experts_down": "mlp.experts.{e}.down_proj",
}
_FUSED = {
    "mlp.experts_up.weight": "mlp.experts.gate_up_proj",
    "mlp.experts_down.weight": "mlp.experts.down_proj",
}


def names(latent: bool, fused: bool) -> dict[str, str]:
    """Returns our names of a layer's parameters and modules, and theirs."""
    table = {**_COMMON, **(_LATENT if latent else _GROUPED), **(_FUSED if fused else _EACH)}
    return {f"blocks.{{i}}.{ours}": f"model.layers.{{i}}.{t}" for ours, t in table.items()}


COPIES = r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight"
"""regular expression of the copies of embedding and head beside a layer of multi-token prediction:
the model's own are used, as in transformers"""
REQUIRED: dict[str, Any] = {
    "hidden_act": ("silu", "swish"),
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
}
"""their keys that have one value; those of the router are DeepSeek's, and published beside"""
FIELDS: tuple[tuple[str, str, Any], ...] = (
    ("num_layers", "num_hidden_layers", None),
    ("hidden", "hidden_size", None),
    ("num_heads", "num_attention_heads", None),
    ("num_kv_heads", "num_key_value_heads", None),
    ("ffn", "intermediate_size", None),
    ("vocab", "vocab_size", None),
    ("max_length", "max_position_embeddings", None),
    ("norm_eps", "rms_norm_eps", 1e-5),
    ("qkv_bias", "attention_bias", False),
    ("tied_head", "tie_word_embeddings", False),
    ("num_experts", "n_routed_experts num_local_experts", None),
    ("experts_per_token", "num_experts_per_tok", None),
    ("expert_ffn", "moe_intermediate_size", None),
    ("num_shared_experts", "n_shared_experts", 1),
    ("num_dense_layers", "first_k_dense_replace", 1),
    ("expert_groups", "n_group", 1),
    ("top_groups", "topk_group", 1),
    ("expert_scale", "routed_scaling_factor", 1.0),
    ("normalize_experts", "norm_topk_prob", True),
    ("num_mtp_layers", "num_nextn_predict_layers num_mtp_layers", 0),
)
"""our field, their keys, and the value where they are absent (None: a key is required)"""
GROUPED_FIELDS = (
    ("head_dim", "head_dim", 0),
    ("qk_norm", "use_qk_norm", False),
)
LATENT_FIELDS = (
    ("kv_latent", "kv_lora_rank", None),
    ("q_latent", "q_lora_rank", 0),
    ("head_dim", "qk_nope_head_dim", None),
    ("rope_head_dim", "qk_rope_head_dim", None),
    ("value_head_dim", "v_head_dim", None),
    ("rope_interleaved", "rope_interleave", True),
)
"""`qk_nope_head_dim` is without the rotated part, our head_dim is with it"""
