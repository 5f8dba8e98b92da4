"""Tiny checkpoints exactly as other projects store them, written here by hand from our weights.

Nothing of glm_core.pretrained.weights is used: these are what it is judged by. Keys and splits
after GLM-130B tools/convert_tp.py, THUDM/GLM change_mp.py, modeling_chatglm.py and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from glm_core.config import ModelConfig
from glm_core.model.glm import GLM

State = dict[str, Tensor]
N, D, H, K, E, F, V, L = 2, 32, 8, 2, 8, 48, 96, 32
SWIGLU: dict[str, Any] = {
    "num_layers": N,
    "hidden": D,
    "num_heads": H,
    "num_kv_heads": K,
    "head_dim": E,
    "ffn": F,
    "vocab": V,
    "max_length": L,
    "norm": "rms",
    "placement": "pre",
    "activation": "swiglu",
    "rope_fraction": 0.5,
    "rope_interleaved": True,
    "linear_bias": False,
    "tied_head": False,
}
PLAIN: dict[str, Any] = {
    "num_layers": N,
    "hidden": D,
    "num_heads": H,
    "ffn": F,
    "vocab": V,
    "max_length": L,
    "qk_layer_scaling": True,
    "rope_float16": True,
}
CHATGLM: dict[str, Any] = {
    **PLAIN,
    "activation": "gelu",
    "positions": "rope_2d",
    "tied_head": False,
    "hidden": 64,
}
CONFIGS = {
    "glm": ModelConfig(**{**SWIGLU, "norm_eps": 1.5625e-7, "rope_base": 500.0}),
    "glm4": ModelConfig(**{**SWIGLU, "placement": "sandwich", "norm_eps": 1.5625e-7}),
    "chatglm2": ModelConfig(**{**SWIGLU, "rope_base": 30000.0}),
    "glm-130b": ModelConfig(**PLAIN),
    "chatglm-6b": ModelConfig(**CHATGLM),
    "sat-chatglm-6b": ModelConfig(**CHATGLM),
    "glm-block": ModelConfig(
        num_layers=N,
        hidden=D,
        num_heads=H,
        ffn=4 * D,
        vocab=V,
        max_length=L,
        placement="pre",
        activation="gelu",
        positions="learned_2d",
    ),
}
MEGATRON = {
    "input_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.qkv": "attention.query_key_value",
    "attention.out": "attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}


def weights(name: str, dtype: torch.dtype = torch.float16) -> State:
    """Our parameters, all different, of a size at which every one matters."""
    g = torch.Generator().manual_seed(1)
    model = GLM(CONFIGS[name])
    state = {}
    for key, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        scale = 0.1 if p.ndim == 1 else 1.0 if "embedding" in key else p.shape[1] ** -0.5
        state[key] = (noise * scale + key.endswith("norm.weight")).to(dtype)
    return state


def inner(ours: State) -> list[tuple[int, str, str, Tensor]]:
    """(layer, module, leaf, value) of the parameters inside the blocks."""
    parts = [(k.split(".", 2), v) for k, v in ours.items() if k.startswith("blocks.")]
    return [(int(p[1]), *p[2].rsplit(".", 1), v) for p, v in parts]  # type: ignore[misc]  # the groups of a match are not typed


def heads(value: Tensor) -> Tensor:
    """Rows q|k|v -> [q_h, k_h, v_h] head by head."""
    e = len(value) // 3 // H
    rows = [value[(p * H + h) * e : (p * H + h + 1) * e] for h in range(H) for p in range(3)]
    return torch.cat(rows)


def sat(ours: State, head: str, by_head: bool) -> State:
    """One rank of GLM-130B or ChatGLM-6B."""
    theirs = {
        "transformer.word_embeddings.weight": ours["embedding"],
        "transformer.final_layernorm.weight": ours["final_norm.weight"],
        "transformer.final_layernorm.bias": ours["final_norm.bias"],
    }
    if head:
        theirs[head] = ours["head"]
    for i, module, leaf, value in inner(ours):
        key = f"transformer.layers.{i}.{MEGATRON[module]}.{leaf}"
        theirs[key] = heads(value) if by_head and "qkv" in module else value
    return theirs


def block(ours: State) -> State:
    """The original GLM."""
    theirs = sat(ours, "", by_head=False)
    theirs["word_embeddings.weight"] = theirs.pop("transformer.word_embeddings.weight")
    theirs["transformer.position_embeddings.weight"] = ours["position_embedding"]
    theirs["transformer.block_position_embeddings.weight"] = ours["block_embedding"]
    return theirs


def chatglm2(ours: State) -> State:
    """ChatGLM2, ChatGLM3, GLM-4 in their authors' code."""
    theirs = {
        "transformer.embedding.word_embeddings.weight": ours["embedding"],
        "transformer.rotary_pos_emb.inv_freq": 1 / 10000 ** (torch.arange(0, 4, 2) / 4).half(),
        "transformer.encoder.final_layernorm.weight": ours["final_norm.weight"],
        "transformer.output_layer.weight": ours["head"],
    }
    for i, module, leaf, value in inner(ours):
        name = MEGATRON[module].replace("attention.", "self_attention.")
        theirs[f"transformer.encoder.layers.{i}.{name}.{leaf}"] = value
    return theirs


def hf(ours: State) -> State:
    """transformers' Glm and Glm4."""
    names = {
        "input_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "post_attention_norm": "post_self_attn_layernorm",
        "post_mlp_norm": "post_mlp_layernorm",
        "attention.out": "self_attn.o_proj",
        "mlp.up": "mlp.gate_up_proj",
        "mlp.down": "mlp.down_proj",
    }
    theirs = {
        "model.embed_tokens.weight": ours["embedding"],
        "lm_head.weight": ours["head"],
        "model.norm.weight": ours["final_norm.weight"],
    }
    for i, module, leaf, value in inner(ours):
        if module == "attention.qkv":
            for p, part in zip("qkv", value.split([H * E, K * E, K * E]), strict=True):
                theirs[f"model.layers.{i}.self_attn.{p}_proj.{leaf}"] = part.contiguous()
        else:
            theirs[f"model.layers.{i}.{names[module]}.{leaf}"] = value
    return theirs


def cut_130b(state: State, size: int, gated: bool = True) -> list[State]:
    """tools/convert_tp.py: norms and the biases after the sum whole, two weights by columns, the
    halves of a GLU each on their own, all else by rows."""
    ranks: list[State] = [{} for _ in range(size)]
    for key, value in state.items():
        whole = "layernorm" in key or key.endswith(("attention.dense.bias", "4h_to_h.bias"))
        for r, rank in enumerate(ranks):
            if whole or "inv_freq" in key:
                part = value
            elif key.endswith(("attention.dense.weight", "4h_to_h.weight")):
                part = value.chunk(size, 1)[r]
            elif "h_to_4h" in key and gated:
                a, b = value.chunk(2)
                part = torch.cat((a.chunk(size)[r], b.chunk(size)[r]))
            else:
                part = value.chunk(size)[r]
            rank[key] = part.clone()
    return ranks


def cut_qkv_blocks(state: State, size: int) -> list[State]:
    """change_mp.py and SAT: every rank holds its q, its k, its v; position tables are whole."""
    positions = {k: v for k, v in state.items() if "position_embeddings" in k}
    ranks = cut_130b({k: v for k, v in state.items() if k not in positions}, size, gated=False)
    for key, value in state.items():
        if "query_key_value" in key:
            q, k, v = (p.chunk(size) for p in value.chunk(3))
            for r, rank in enumerate(ranks):
                rank[key] = torch.cat((q[r], k[r], v[r]))
    return [{**rank, **positions} for rank in ranks]


def quantize(ranks: list[State], bits: int) -> list[State]:
    """GLM-130B quantization: after the split, per row; the even element in the high nibble."""
    linears = ("query_key_value.weight", "dense.weight", "4h.weight", "4h_to_h.weight")
    result = []
    for rank in ranks:
        new: State = {}
        for key, w in rank.items():
            if not key.endswith(linears):
                new[key] = w
                continue
            scale = (w.float().abs().amax(1) / (2 ** (bits - 1) - 1)).half()
            q = (w.float() / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8)
            if bits == 4:
                even, odd = q[:, 0::2].int(), q[:, 1::2].int()
                q = ((even << 4) | (odd & 15)).to(torch.int8)
            new[key], new[f"{key}_scale"] = q, scale
        result.append(new)
    return result


SPECIAL = {"bos_token_id": 90, "eos_token_id": 91, "pad_token_id": 3}
DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "chatglm2": {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "num_layers": N,
        "hidden_size": D,
        "ffn_hidden_size": F,
        "kv_channels": E,
        "num_attention_heads": H,
        "multi_query_attention": True,
        "multi_query_group_num": K,
        "padded_vocab_size": V,
        "seq_length": L,
        "layernorm_epsilon": 1e-5,
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "rope_ratio": 3,
        "tie_word_embeddings": False,
        **SPECIAL,
    },
    "glm-130b": {
        "model_class": "GLM130B",
        "num_layers": N,
        "hidden_size": D,
        "num_attention_heads": H,
        "inner_hidden_size": F,
        "vocab_size": V,
        "max_sequence_length": L,
        "layernorm_order": "post",
        "model_parallel_size": 8,
    },
    "chatglm-6b": {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "num_layers": N,
        "hidden_size": 64,
        "inner_hidden_size": F,
        "num_attention_heads": H,
        "vocab_size": V,
        "max_sequence_length": L,
        "layernorm_epsilon": 1e-5,
        "position_encoding_2d": True,
        **SPECIAL,
    },
    "sat-chatglm-6b": {
        "model_class": "ChatGLMModel",
        "num_layers": N,
        "hidden_size": 64,
        "vocab_size": V,
        "inner_hidden_size": F,
        "num_attention_heads": H,
        "max_sequence_length": L,
    },
    "glm-block": {
        "model_type": "glm",
        "num_layers": N,
        "hidden_size": D,
        "num_attention_heads": H,
        "vocab_size": V,
        "max_sequence_length": L,
        "block_position_encoding": True,
    },
}
for _kind, _extra in (("glm", {"rope_theta": 500.0}), ("glm4", {})):
    DESCRIPTIONS[_kind] = {
        "model_type": _kind,
        "num_hidden_layers": N,
        "hidden_size": D,
        "intermediate_size": F,
        "num_attention_heads": H,
        "num_key_value_heads": K,
        "head_dim": E,
        "vocab_size": V,
        "max_position_embeddings": L,
        "rms_norm_eps": 1.5625e-7,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "partial_rotary_factor": 0.5,
        **_extra,
        **SPECIAL,
    }
STATES: dict[str, Callable[[State], State]] = {
    "glm": hf,
    "glm4": hf,
    "chatglm2": chatglm2,
    "glm-block": block,
    "glm-130b": lambda w: sat(w, "", by_head=True),
    "chatglm-6b": lambda w: sat(w, "lm_head.weight", by_head=True),
    "sat-chatglm-6b": lambda w: sat(w, "mixins.chatglm-final.lm_head.weight", by_head=False),
}


def ranks_of(name: str, size: int = 1, bits: int = 0) -> list[State]:
    """What each rank's file holds."""
    state = STATES[name](weights(name))
    cut = cut_130b if name == "glm-130b" else cut_qkv_blocks
    ranks = [state] if size == 1 else cut(state, size)
    return quantize(ranks, bits) if bits else ranks


def write(folder: Path, name: str, size: int = 1, bits: int = 0) -> Path:
    """A checkpoint folder: two .bin files for ChatGLM, two safetensors for transformers, each with
    an index; shards for the rest."""
    folder.mkdir(parents=True)
    ranks = ranks_of(name, size, bits)
    described = "model_config.json" if "model_class" in DESCRIPTIONS[name] else "config.json"
    (folder / described).write_text(json.dumps(DESCRIPTIONS[name]))
    if name in ("glm-130b", "sat-chatglm-6b", "glm-block"):
        (folder / "latest").write_text("49300\n")
        (folder / "49300").mkdir()
        for r, state in enumerate(ranks):
            file = folder / f"49300/mp_rank_{r:02d}_model_states.pt"
            torch.save({"module": state, "iteration": 49300}, file)
        return folder
    keys = list(ranks[0])
    suffix, stem = ("safetensors", "model") if name.startswith("glm") else ("bin", "pytorch_model")
    index: dict[str, str] = {}
    for i, part in enumerate((keys[: len(keys) // 2], keys[len(keys) // 2 :])):
        file = f"{stem}-0000{i + 1}-of-00002.{suffix}"
        index.update(dict.fromkeys(part, file))
        tensors = {k: ranks[0][k] for k in part}
        if suffix == "bin":
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file, {"format": "pt"})
    (folder / f"{stem}.{suffix}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    return folder
