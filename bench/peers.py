"""Other engines that decode the same shapes: transformers, torchao on it, ONNX Runtime on the file
that we export."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from glm_core.config import ModelConfig
from glm_core.model import GLM
from glm_core.model.prompt import causal


class Engine(NamedTuple):
    """A contestant: one call decodes one token (or, in prefill, reads the prompt)."""

    name: str
    dtype: str
    step: Callable[[], Any]
    num_bytes: int
    """weights read by one step"""


def transformers_glm(config: ModelConfig, dtype: str, prompt: int, prefill: bool) -> Engine:
    """transformers' GlmForCausalLM with its own cache."""
    model = _inference(config, dtype)
    return _engine("transformers", dtype, model, prompt, prefill, _linear_bytes(model))


def torchao_glm(config: ModelConfig, bits: int, prompt: int, prefill: bool) -> Engine:
    """transformers' in bfloat16 with torchao's weight-only int8, or int4 in groups of 128 (its
    prototype for CPUs); the bytes are those of codes and bfloat16 scales, head included."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = _inference(config, "bfloat16")
    weights = _linear_bytes(model) // 2
    if bits == 8:
        quantize_(model, Int8WeightOnlyConfig())
    else:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=128))
    size = weights if bits == 8 else weights // 2 + weights // 128 * 4  # scale and zero point
    return _engine("torchao on transformers", f"int{bits}", model, prompt, prefill, size)


def _inference(config: ModelConfig, dtype: str) -> Any:
    return glm(config).to(getattr(torch, dtype)).eval().requires_grad_(False)


def glm(config: ModelConfig, **more: Any) -> Any:
    """transformers' GlmForCausalLM in these sizes, float32, from a fixed seed; `more` goes into
    its config."""
    from transformers import GlmConfig, GlmForCausalLM

    settings = GlmConfig(
        vocab_size=config.vocab, hidden_size=config.hidden, intermediate_size=config.ffn,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, attention_bias=True,
        max_position_embeddings=config.max_length, pad_token_id=0, eos_token_id=1,
        **more,
    )  # fmt: skip
    torch.manual_seed(0)
    return GlmForCausalLM(settings)


def _linear_bytes(model: Any) -> int:
    return sum(m.weight.nbytes for m in model.modules() if isinstance(m, torch.nn.Linear))


def _engine(name: str, dtype: str, model: Any, prompt: int, prefill: bool, size: int) -> Engine:
    from transformers import DynamicCache

    text = torch.arange(prompt)[None] % model.config.vocab_size
    token, cache = torch.tensor([[7]]), DynamicCache()

    def fill() -> None:
        with torch.no_grad():
            model(input_ids=text, use_cache=True, logits_to_keep=1)

    def decode() -> None:
        with torch.no_grad():
            model(input_ids=token, past_key_values=cache, use_cache=True)

    with torch.no_grad():
        model(input_ids=text, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return Engine(name, dtype, fill if prefill else decode, size)


def onnxruntime_glm(model: GLM, prompt: int, prefill: bool, size: int) -> Engine:
    """Our quantised float32 model exported with its cache (MatMulNBits, its own int8 activations),
    a whole step each call, always after the same prompt."""
    import numpy as np
    import onnxruntime

    from glm_core.export.write import export

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = export(model, Path(folder, "model"), stop="[]")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    c, text = model.config, causal([i % model.config.vocab for i in range(prompt)])
    kinds = [f"{i}.{which}" for i in range(c.num_layers) for which in ("key", "value")]
    cache: dict[str, Any] = {}

    def feed(tokens: list[int], first: int) -> Any:
        places = range(first, first + len(tokens))
        empty = np.zeros((1, c.num_kv_heads, 0, c.head_dim), np.float32)
        given = {
            "input_ids": np.array([tokens]),
            "positions": np.array([text.position(p) for p in places]).T[None],
            "key_start": np.zeros((1, len(tokens)), np.int64),
            "key_end": np.array([[min(text.key_end(p), places.stop) for p in places]]),
            **{f"past_key_values.{k}": cache.get(k, empty) for k in kinds},
        }
        return session.run(["logits", *(f"present.{k}" for k in kinds)], given)[1:]

    if not prefill:
        cache.update(zip(kinds, feed(list(text.tokens), 0), strict=True))
    step = (list(text.tokens), 0) if prefill else ([7], prompt)
    return Engine("onnxruntime, whole model", "int4", lambda: feed(*step), size)
