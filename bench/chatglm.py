"""Runs chatglm.cpp on a model of the same shapes, written by its own converter."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from glm_core.bench.peers import Engine
from glm_core.config import ModelConfig
from glm_core.data import tokenizer

TEXT = ["never read, since the engine is given tokens"]


def chatglm(config: ModelConfig, prompt: int, prefill: bool) -> Engine:
    """Returns chatglm.cpp's ChatGLM2 with random weights: Q4_0 (blocks of 32, a float16 scale
    each), head included, on as many threads as there are cores."""
    from chatglm_cpp import Pipeline
    from chatglm_cpp._C import GenerationConfig

    weights = _weights(config)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.bin")
        _write(config, weights, file)
        pipeline = Pipeline(str(file))
    greedy = GenerationConfig(max_length=config.max_length, do_sample=False)
    text = [i % config.vocab for i in range(prompt)]

    def fill() -> None:
        pipeline.model.generate_next_token(text, None, greedy, 0, prompt)

    def decode() -> None:
        nonlocal text
        text = [*text, 7]
        pipeline.model.generate_next_token(text, None, greedy, len(text) - 1, prompt)

    fill()
    products = [w for name, w in weights.items() if w.ndim == 2 and "embedding" not in name]
    size = sum(w.numel() for w in products) * 18 // 32
    return Engine("chatglm.cpp", "int4", fill if prefill else decode, size)


def _weights(c: ModelConfig) -> dict[str, Tensor]:
    """Returns random weights by ChatGLM2's names."""
    draw = torch.Generator().manual_seed(0)

    def product(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=draw) * 0.02

    inner = c.num_heads * c.head_dim
    qkv = inner + 2 * c.num_kv_heads * c.head_dim
    weights = {"transformer.embedding.word_embeddings.weight": product(c.vocab, c.hidden)}
    for i in range(c.num_layers):
        layer = {
            "input_layernorm.weight": torch.ones(c.hidden),
            "self_attention.query_key_value.weight": product(qkv, c.hidden),
            "self_attention.query_key_value.bias": torch.ones(qkv),
            "self_attention.dense.weight": product(c.hidden, inner),
            "post_attention_layernorm.weight": torch.ones(c.hidden),
            "mlp.dense_h_to_4h.weight": product(2 * c.ffn, c.hidden),
            "mlp.dense_4h_to_h.weight": product(c.hidden, c.ffn),
        }
        weights |= {f"transformer.encoder.layers.{i}.{name}": w for name, w in layer.items()}
    weights["transformer.encoder.final_layernorm.weight"] = torch.ones(c.hidden)
    weights["transformer.output_layer.weight"] = product(c.vocab, c.hidden)
    return weights


def _write(c: ModelConfig, weights: dict[str, Tensor], file: Path) -> None:
    from chatglm_cpp.convert import ChatGLM2Converter, GGMLType

    settings = SimpleNamespace(
        add_bias_linear=False,
        add_qkv_bias=True,
        apply_residual_connection_post_layernorm=False,
        multi_query_attention=True,
        original_rope=True,
        post_layer_norm=True,
        rmsnorm=True,
        kv_channels=c.head_dim,
        hidden_size=c.hidden,
        num_attention_heads=c.num_heads,
        padded_vocab_size=c.vocab,
        multi_query_group_num=c.num_kv_heads,
        num_layers=c.num_layers,
        ffn_hidden_size=c.ffn,
        layernorm_epsilon=c.norm_eps,
        seq_length=c.max_length,
        eos_token_id=None,
        pad_token_id=None,
        quantization_bit=0,
    )
    model_proto = tokenizer.train(TEXT, 300)
    sentencepiece = SimpleNamespace(serialized_model_proto=lambda: model_proto)
    model = SimpleNamespace(config=settings, state_dict=lambda: weights)
    printed: Any = io.StringIO()  # the converter prints every tensor
    with (
        file.open("wb") as out,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        wrapped = SimpleNamespace(tokenizer=SimpleNamespace(sp_model=sentencepiece))
        ChatGLM2Converter.convert(out, model, wrapped, GGMLType.Q4_0)
