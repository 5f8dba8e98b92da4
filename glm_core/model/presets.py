"""Lists the published sizes of the family, and the small models that the project itself
trains."""

from __future__ import annotations

import dataclasses
from typing import Any

from glm_core.config import ModelConfig
from glm_core.errors import ConfigError, unknown

_GLM: dict[str, Any] = {
    "placement": "pre",
    "activation": "gelu",
    "positions": "learned_2d",
    "max_length": 1024,
}
_CHATGLM2: dict[str, Any] = {
    "num_layers": 28,
    "hidden": 4096,
    "num_heads": 32,
    "num_kv_heads": 2,
    "ffn": 13696,
    "norm": "rms",
    "placement": "pre",
    "activation": "swiglu",
    "positions": "rope",
    "rope_fraction": 0.5,
    "rope_interleaved": True,
    "linear_bias": False,
    "tied_head": False,
}
_GLM4: dict[str, Any] = {
    **_CHATGLM2,
    "num_layers": 40,
    "vocab": 151552,
    "norm_eps": 1.5625e-7,
    "max_length": 131072,
}
_MOE: dict[str, Any] = {
    "norm": "rms",
    "norm_eps": 1e-5,
    "placement": "pre",
    "activation": "swiglu",
    "positions": "rope",
    "linear_bias": False,
    "tied_head": False,
    "num_shared_experts": 1,
    "num_mtp_layers": 1,
}
_GLM45: dict[str, Any] = {
    **_MOE,
    "num_heads": 96,
    "num_kv_heads": 8,
    "head_dim": 128,
    "vocab": 151552,
    "max_length": 131072,
    "rope_base": 1e6,
    "rope_fraction": 0.5,
    "experts_per_token": 8,
}
_GLM45_355B: dict[str, Any] = {
    **_GLM45,
    "num_layers": 92,
    "hidden": 5120,
    "ffn": 12288,
    "qk_norm": True,
    "num_experts": 160,
    "expert_ffn": 1536,
    "num_dense_layers": 3,
    "expert_scale": 2.5,
}
_130B: dict[str, Any] = {
    "placement": "deepnorm",
    "activation": "geglu",
    "positions": "rope",
    "qk_layer_scaling": True,
    "embedding_gradient_shrink": 0.1,
}

PRESETS: dict[str, dict[str, Any]] = {
    # THUDM/GLM config/ds_block_base.sh and ds_block_10B.sh; vocabularies padded to a multiple of
    # 128
    "glm-base": {
        **_GLM,
        "num_layers": 12,
        "hidden": 768,
        "num_heads": 12,
        "ffn": 3072,
        "vocab": 30592,
        "max_length": 512,
    },
    "glm-large": {
        **_GLM,
        "num_layers": 24,
        "hidden": 1024,
        "num_heads": 16,
        "ffn": 4096,
        "vocab": 30592,
        "max_length": 512,
    },
    "glm-10b": {
        **_GLM,
        "num_layers": 48,
        "hidden": 4096,
        "num_heads": 64,
        "ffn": 16384,
        "vocab": 50304,
    },
    # THUDM/GLM-130B configs/model_glm_130b.sh; Zeng et al. 2022, table 11
    "glm-130b": {
        **_130B,
        "num_layers": 70,
        "hidden": 12288,
        "num_heads": 96,
        "ffn": 32768,
        "vocab": 150528,
        "max_length": 2048,
        "init_std": 0.0052,
        "rope_float16": True,
    },
    # ChatGLM-6B configuration_chatglm.py; its separate lm_head is counted as shared, as the
    # published 6.2B is
    "chatglm-6b": {
        "num_layers": 28,
        "hidden": 4096,
        "num_heads": 32,
        "ffn": 16384,
        "vocab": 130528,
        "max_length": 2048,
        "placement": "deepnorm",
        "activation": "gelu",
        "positions": "rope_2d",
        "qk_layer_scaling": True,
        "rope_float16": True,
    },
    "chatglm2-6b": {**_CHATGLM2, "vocab": 65024, "max_length": 32768},
    "chatglm3-6b": {**_CHATGLM2, "vocab": 65024, "max_length": 8192},
    # transformers 5.23 glm/configuration_glm.py, glm4/configuration_glm4.py
    "glm-4-9b": _GLM4,
    "glm-4-0414-9b": {**_GLM4, "placement": "sandwich"},
    # the config.json of zai-org's GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7 and GLM-4.7-Flash
    "glm-4.5": _GLM45_355B,
    "glm-4.5-air": {
        **_GLM45,
        "num_layers": 46,
        "hidden": 4096,
        "ffn": 10944,
        "num_experts": 128,
        "expert_ffn": 1408,
        "num_dense_layers": 1,
    },
    "glm-4.6": {**_GLM45_355B, "max_length": 202752},
    "glm-4.7": {**_GLM45_355B, "max_length": 202752},
    "glm-4.7-flash": {
        **_MOE,
        "num_layers": 47,
        "hidden": 2048,
        "num_heads": 20,
        "head_dim": 256,
        "kv_latent": 512,
        "q_latent": 768,
        "rope_head_dim": 64,
        "value_head_dim": 256,
        "ffn": 10240,
        "vocab": 154880,
        "max_length": 202752,
        "rope_base": 1e6,
        "rope_interleaved": True,
        "qkv_bias": False,
        "num_experts": 64,
        "experts_per_token": 4,
        "expert_ffn": 1536,
        "num_dense_layers": 1,
        "expert_scale": 1.8,
    },
    # our own: the main job's model, its sparse sibling, and the one of bench.step
    "tiny": {
        **_130B,
        "num_layers": 4,
        "hidden": 128,
        "num_heads": 4,
        "ffn": 344,
        "vocab": 4096,
        "max_length": 512,
        "embedding_gradient_shrink": 0.1,
    },
    "tiny-moe": {
        **_MOE,
        "num_layers": 4,
        "hidden": 128,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "ffn": 344,
        "vocab": 4096,
        "max_length": 512,
        "rope_fraction": 0.5,
        "qk_norm": True,
        "num_experts": 16,
        "experts_per_token": 4,
        "expert_ffn": 88,
        "num_dense_layers": 1,
        "expert_groups": 4,
        "top_groups": 2,
        "expert_scale": 1.8,
    },
    "glm4-34m": {
        **_GLM4,
        "num_layers": 8,
        "hidden": 512,
        "num_heads": 8,
        "num_kv_heads": 8,
        "ffn": 1408,
        "vocab": 8192,
        "max_length": 1024,
    },
}


def preset(name: str, **changes: Any) -> ModelConfig:
    """Returns the preset's config with `changes` applied. Raises ConfigError for an unknown name or
    field."""
    if name.startswith("glm-5"):
        raise ConfigError(
            f"preset {name!r}: its attention chooses keys by an indexer (glm_moe_dsa), which is "
            "not implemented; use glm-4.7 or glm-4.7-flash"
        )
    if name not in PRESETS:
        raise ConfigError(unknown("preset", name, PRESETS))
    fields = [f.name for f in dataclasses.fields(ModelConfig)]
    if strange := [unknown("model field", key, fields) for key in changes if key not in fields]:
        raise ConfigError("; ".join(strange))
    return ModelConfig(**{**PRESETS[name], **changes})
