"""Makes transformers' models with experts and with latent attention, and writes their folders as
transformers does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

L, V = 20, 83
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 40,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "routed_scaling_factor": 1.7,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 12}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 28,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped": ("Glm4Moe", {**GROUPED, "use_qk_norm": True, "n_group": 4, "topk_group": 2}),
    "grouped-bias": (
        "Glm4Moe",
        {
            **GROUPED,
            "attention_bias": True,
            "first_k_dense_replace": 2,
            "norm_topk_prob": False,
            "n_shared_experts": 2,
        },
    ),
    "grouped-tied": (
        "Glm4Moe",
        {**GROUPED, "first_k_dense_replace": 0, "tie_word_embeddings": True, "n_routed_experts": 6},
    ),
    "latent": ("Glm4MoeLite", {**LATENT, "n_group": 2, "topk_group": 1}),
    "latent-bias": (
        "Glm4MoeLite",
        {
            **LATENT,
            "q_lora_rank": None,
            "attention_bias": True,
            "rope_interleave": False,
            "v_head_dim": 24,
            "mlp_layer_types": ["dense", "dense", "sparse"],
        },
    ),
    "latent-yarn": ("Glm4MoeLite", {**LATENT, "rope_parameters": YARN, "norm_topk_prob": False}),
}


def peer(case: str, **changes: Any) -> nn.Module:
    """Returns transformers' model with weights so large that every part matters."""
    kind, sizes = CASES[case]
    import transformers  # where it is not installed, the tests are skipped

    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **sizes, **changes})
    config._attn_implementation = "eager"
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                std = 0.2 if p.ndim == 1 else p.shape[-1] ** -0.5
                p.copy_(torch.randn(p.shape, generator=g) * std + ("norm" in name))
    return model


def folder(path: Path, model: Any, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
    """Writes a model as transformers does."""
    copy.deepcopy(model).to(dtype).save_pretrained(path, **how)
    return path


def batch(seed: int = 5, rows: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns tokens, positions, key_start and key_end of causal rows."""
    tokens = torch.randint(2, V, (rows, L), generator=torch.Generator().manual_seed(seed))
    places = torch.arange(L).expand(rows, L)
    start = torch.zeros(rows, L, dtype=torch.int32)
    return tokens, places[:, None].expand(rows, 2, L), start, (places + 1).int()


def with_mtp(
    path: Path, fused: bool, dtype: torch.dtype, **changes: Any
) -> tuple[nn.Module, nn.Module]:
    """Writes a model of GLM-4.5's kind with its layer of multi-token prediction, as it is
    published or with all experts in one tensor. Returns transformers' model and that layer."""
    from transformers.modeling_layers import MtpModel

    theirs = peer("grouped", **changes).to(dtype)
    mtp = MtpModel(theirs, 1).to(dtype).eval()  # type: ignore[arg-type]  # a model of transformers
    g = torch.Generator().manual_seed(8)
    state = {k: v for k, v in mtp.state_dict().items() if k.startswith("layers.0.")}
    for name, value in state.items():
        value.copy_(torch.randn(value.shape, generator=g) * 0.2 + ("norm" in name))
    folder(path, theirs, dtype, save_original_format=not fused)
    tensors = load_file(path / "model.safetensors")
    for name, value in state.items():
        name = name.replace("layers.0.", "model.layers.3.").replace("mtp_block.", "")
        name = name.replace("post_norm", "shared_head.norm")
        if fused or ".experts." not in name:
            tensors[name] = value.clone()
            continue
        for i, expert in enumerate(value):
            stem, _, leaf = name.rpartition(".")
            both = leaf == "gate_up_proj"
            for part, kind in zip(
                expert.chunk(1 + both), leaf.removesuffix("_proj").split("_"), strict=True
            ):
                tensors[f"{stem}.{i}.{kind}_proj.weight"] = part.clone()
    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return theirs, mtp
