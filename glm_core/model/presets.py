"""Lists the published sizes of the family, and the two small models that the project itself
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
    # our own: the main job's model, and the one of bench.step
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
    if name not in PRESETS:
        raise ConfigError(unknown("preset", name, PRESETS))
    fields = [f.name for f in dataclasses.fields(ModelConfig)]
    if strange := [unknown("model field", key, fields) for key in changes if key not in fields]:
        raise ConfigError("; ".join(strange))
    return ModelConfig(**{**PRESETS[name], **changes})
