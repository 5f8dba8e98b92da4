"""Runs llama.cpp on a model of the same shapes, written as GGUF."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from glm_core.bench.peers import Engine
from glm_core.config import ModelConfig


def llama(config: ModelConfig, prompt: int, prefill: bool) -> Engine:
    """Returns llama.cpp on a GGUF file of its architecture `chatglm` with random weights: Q4_0
    (blocks of 32, a float16 scale each), head included."""
    from llama_cpp import Llama

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.gguf")
        size = _gguf(config, file)
        threads = torch.get_num_threads()
        model = Llama(
            str(file),
            n_ctx=config.max_length,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
    text = [i % config.vocab for i in range(prompt)]

    def fill() -> None:
        model.reset()
        model.eval(text)

    fill()
    step = fill if prefill else lambda: model.eval([7])
    return Engine("llama.cpp", "int4", step, size)


def _gguf(config: ModelConfig, file: Path) -> int:
    """Writes the model and returns the bytes of its products' weights."""
    import gguf
    import numpy as np

    c, kind = config, gguf.GGMLQuantizationType.Q4_0
    writer, size = gguf.GGUFWriter(file, "chatglm"), 0
    writer.add_context_length(c.max_length)
    writer.add_embedding_length(c.hidden)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.ffn)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_dimension_count(int(c.head_dim * c.rope_fraction))
    writer.add_rope_freq_base(c.rope_base)
    writer.add_vocab_size(c.vocab)
    writer.add_tokenizer_model("no_vocab")
    random = np.random.default_rng(0)

    def product(name: str, rows: int, columns: int) -> None:
        nonlocal size
        w = random.standard_normal((rows, columns), np.float32) * 0.02
        codes = gguf.quants.quantize(w, kind)
        size += codes.nbytes * (name != "token_embd")
        writer.add_tensor(f"{name}.weight", codes, raw_dtype=kind)

    def ones(name: str, size: int) -> None:
        writer.add_tensor(name, np.ones(size, np.float32))

    inner = c.num_heads * c.head_dim
    qkv = inner + 2 * c.num_kv_heads * c.head_dim
    product("token_embd", c.vocab, c.hidden)
    for i in range(c.num_layers):
        ones(f"blk.{i}.attn_norm.weight", c.hidden)
        product(f"blk.{i}.attn_qkv", qkv, c.hidden)
        ones(f"blk.{i}.attn_qkv.bias", qkv)
        product(f"blk.{i}.attn_output", c.hidden, inner)
        ones(f"blk.{i}.ffn_norm.weight", c.hidden)
        product(f"blk.{i}.ffn_up", 2 * c.ffn, c.hidden)
        product(f"blk.{i}.ffn_down", c.hidden, c.ffn)
    ones("output_norm.weight", c.hidden)
    product("output", c.vocab, c.hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return size
