"""Runs llama.cpp on a model of the same shapes, written as GGUF."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from glm_core.bench.peers import Engine
from glm_core.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]
"""tensors by name, as torch has their dims"""
KEPT = ("norm.weight", "bias", "ffn_gate_inp.weight")
"""how names of float32 tensors end"""
VARIED = 64
"""tokens that are decoded in turn: experts vary with them"""


def llama(config: ModelConfig, prompt: int, prefill: bool, context: int = 0) -> Engine:
    """Returns llama.cpp on a GGUF file with random weights: Q4_0 (blocks of 32, a float16 scale
    each), head included. Its architecture is `chatglm`; or `deepseek2` with latent attention, where
    llama.cpp has GLM-4.7-Flash. context: by default the model's."""
    from llama_cpp import Llama

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.gguf")
        size = _gguf(config, file)
        threads = torch.get_num_threads()
        model = Llama(
            str(file),
            n_ctx=context or config.max_length,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
    text = [i % config.vocab for i in range(prompt)]
    tokens = itertools.cycle(range(7, 7 + min(VARIED, config.vocab - 7)))

    def fill() -> None:
        model.reset()
        model.eval(text)

    fill()
    step = fill if prefill else lambda: model.eval([next(tokens)])
    return Engine("llama.cpp", "int4", step, size)


def _gguf(config: ModelConfig, file: Path) -> int:
    """Writes the model, a tensor at a time, and returns the bytes of its products' weights that a
    token reads."""
    import gguf
    import numpy as np

    c, random, size = config, np.random.default_rng(0), 0.0
    writer = gguf.GGUFWriter(file, "deepseek2" if c.kv_latent else "chatglm")
    _describe(writer, c)
    shapes: Shapes = {"token_embd.weight": (c.vocab, c.hidden)}
    for i in range(c.num_layers):
        block = _latent_block(c, sparse=i >= c.num_dense_layers) if c.kv_latent else _block(c)
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    shapes |= {"output_norm.weight": (c.hidden,), "output.weight": (c.vocab, c.hidden)}

    def coded(shape: tuple[int, ...]) -> Any:
        blocks = np.empty((*shape[:-1], shape[-1] // 32), [("scale", "<f2"), ("codes", "V16")])
        blocks["scale"] = 0.02 / math.sqrt(21.25)  # codes -8 ... 7 have a deviation of sqrt(21.25)
        blocks["codes"] = np.frombuffer(random.bytes(16 * blocks.size), "V16").reshape(blocks.shape)
        return blocks.view(np.uint8)

    def values(name: str, shape: tuple[int, ...]) -> Any:
        if not name.endswith(KEPT):
            return coded(shape)
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return random.standard_normal(shape, np.float32) * np.float32(0.02)

    for name, shape in shapes.items():
        kinds = gguf.GGMLQuantizationType
        kind = kinds.F32 if name.endswith(KEPT) else kinds.Q4_0
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        num_bytes = math.prod(shape) * block_bytes // block
        writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, raw_dtype=kind)
        if kind == kinds.Q4_0 and name != "token_embd.weight":
            size += num_bytes * (c.experts_per_token / c.num_experts if "_exps." in name else 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in shapes.items():
        writer.write_tensor_data(values(name, shape))
    writer.close()
    return round(size)


def _describe(writer: Any, c: ModelConfig) -> None:
    """Adds the keys that llama.cpp's loader of the architecture wants."""
    import gguf

    writer.add_context_length(c.max_length)
    writer.add_embedding_length(c.hidden)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.ffn)
    writer.add_head_count(c.num_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_vocab_size(c.vocab)
    writer.add_tokenizer_model("no_vocab")
    if not c.kv_latent:
        writer.add_head_count_kv(c.num_kv_heads)
        writer.add_rope_dimension_count(int(c.head_dim * c.rope_fraction))
        return
    writer.add_head_count_kv(1)  # absorbed: all heads attend to the latents
    writer.add_rope_dimension_count(c.rope_head_dim)
    writer.add_key_length(c.kv_latent + c.rope_head_dim)
    writer.add_value_length(c.kv_latent)
    writer.add_key_length_mla(c.head_dim)
    writer.add_value_length_mla(c.value_head_dim)
    writer.add_q_lora_rank(c.q_latent)
    writer.add_kv_lora_rank(c.kv_latent)
    writer.add_leading_dense_block_count(c.num_dense_layers)
    writer.add_expert_count(c.num_experts)
    writer.add_expert_used_count(c.experts_per_token)
    writer.add_expert_shared_count(c.num_shared_experts)
    writer.add_expert_feed_forward_length(c.expert_ffn)
    writer.add_expert_weights_scale(c.expert_scale)
    writer.add_expert_weights_norm(c.normalize_experts)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _block(c: ModelConfig) -> Shapes:
    inner = c.num_heads * c.head_dim
    qkv = inner + 2 * c.num_kv_heads * c.head_dim
    return {
        "attn_norm.weight": (c.hidden,),
        "attn_qkv.weight": (qkv, c.hidden),
        "attn_qkv.bias": (qkv,),
        "attn_output.weight": (c.hidden, inner),
        "ffn_norm.weight": (c.hidden,),
        "ffn_up.weight": (2 * c.ffn, c.hidden),
        "ffn_down.weight": (c.hidden, c.ffn),
    }


def _latent_block(c: ModelConfig, sparse: bool) -> Shapes:
    heads, plain = c.num_heads, c.head_dim - c.rope_head_dim
    attention = {
        "attn_norm.weight": (c.hidden,),
        "attn_q_a.weight": (c.q_latent, c.hidden),
        "attn_q_a_norm.weight": (c.q_latent,),
        "attn_q_b.weight": (heads * c.head_dim, c.q_latent),
        "attn_kv_a_mqa.weight": (c.kv_latent + c.rope_head_dim, c.hidden),
        "attn_kv_a_norm.weight": (c.kv_latent,),
        "attn_k_b.weight": (heads, c.kv_latent, plain),
        "attn_v_b.weight": (heads, c.value_head_dim, c.kv_latent),
        "attn_output.weight": (c.hidden, heads * c.value_head_dim),
        "ffn_norm.weight": (c.hidden,),
    }
    if not sparse:
        return attention | _feed_forward((), "", c.hidden, c.ffn)
    shared = c.num_shared_experts * c.expert_ffn
    return {
        **attention,
        "ffn_gate_inp.weight": (c.num_experts, c.hidden),
        "exp_probs_b.bias": (c.num_experts,),
        **_feed_forward((c.num_experts,), "_exps", c.hidden, c.expert_ffn),
        **_feed_forward((), "_shexp", c.hidden, shared),
    }


def _feed_forward(experts: tuple[int, ...], kind: str, hidden: int, ffn: int) -> Shapes:
    return {
        f"ffn_gate{kind}.weight": (*experts, ffn, hidden),
        f"ffn_up{kind}.weight": (*experts, ffn, hidden),
        f"ffn_down{kind}.weight": (*experts, hidden, ffn),
    }
