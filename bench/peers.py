"""Runs other engines on the same shapes: transformers, torchao on it, ONNX Runtime on the file that
we export, ONNX Runtime GenAI on a file of its own builder."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from glm_core.config import ModelConfig
from glm_core.model.glm import GLM
from glm_core.model.prompt import causal


class Engine(NamedTuple):
    """A contestant, whose step decodes one token or, in prefill, reads the prompt."""

    name: str
    dtype: str
    step: Callable[[], Any]
    num_bytes: int
    """bytes of the weights that one step reads"""


def transformers_glm(config: ModelConfig, dtype: str, prompt: int, prefill: bool) -> Engine:
    """Returns transformers' GlmForCausalLM with its own cache."""
    model = _inference(config, dtype)
    return _engine("transformers", dtype, model, prompt, prefill, _linear_bytes(model))


def torchao_glm(config: ModelConfig, bits: int, prompt: int, prefill: bool) -> Engine:
    """Returns transformers' model in bfloat16 with torchao's weight-only int8, or int4 in groups
    of 128 (its prototype for CPUs). The bytes are those of codes and bfloat16 scales, head
    included."""
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
    """Returns transformers' GlmForCausalLM in these sizes, or Glm4MoeForCausalLM of a model with
    experts, float32, from a fixed seed. `more` goes into its config."""
    import transformers

    sparse = bool(config.num_experts)
    sizes = {
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "attention_bias": config.qkv_bias,
        "max_position_embeddings": config.max_length,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    name = "Glm4Moe" if sparse else "Glm"
    settings = getattr(transformers, f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(0)
    return model(settings(**sizes, **(_experts(config) if sparse else {}), **more))


def _experts(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_ffn,
        "n_shared_experts": config.num_shared_experts,
        "first_k_dense_replace": config.num_dense_layers,
        "n_group": config.expert_groups,
        "topk_group": config.top_groups,
        "routed_scaling_factor": config.expert_scale,
        "norm_topk_prob": config.normalize_experts,
        "use_qk_norm": config.qk_norm,
    }


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
    """Returns ONNX Runtime on our quantised float32 model, exported with its cache (MatMulNBits,
    its own int8 activations). Every call is a whole step after the same prompt."""
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
        inputs = {
            "input_ids": np.array([tokens]),
            "positions": np.array([text.position(p) for p in places]).T[None],
            "key_start": np.zeros((1, len(tokens)), np.int64),
            "key_end": np.array([[min(text.key_end(p), places.stop) for p in places]]),
            **{f"past_key_values.{k}": cache.get(k, empty) for k in kinds},
        }
        return session.run(["logits", *(f"present.{k}" for k in kinds)], inputs)[1:]

    if not prefill:
        cache.update(zip(kinds, feed(list(text.tokens), 0), strict=True))
    step = (list(text.tokens), 0) if prefill else ([7], prompt)
    return Engine("onnxruntime, whole model", "int4", lambda: feed(*step), size)


def genai(config: ModelConfig, prompt: int, prefill: bool) -> Engine:
    """Returns ONNX Runtime GenAI on a Qwen2 of transformers of these sizes, converted by its own
    builder, which does not support Glm; Qwen2 differs only in what is rotated. int4 in blocks of
    128, head included, float32 scales."""
    import onnxruntime_genai as og

    with tempfile.TemporaryDirectory() as folder:
        size = _qwen2(config, Path(folder, "hf"))
        converted = _converted(Path(folder, "hf"), Path(folder, "onnx"))
        model = og.Model(str(converted))
    settings = og.GeneratorParams(model)
    # the least length is the greatest: random weights may end the text at any time
    settings.set_search_options(
        do_sample=False, max_length=config.max_length, min_length=config.max_length
    )
    text = [i % config.vocab for i in range(prompt)]

    def fill() -> Any:
        generator = og.Generator(model, settings)
        generator.append_tokens(text)
        return generator

    step = fill if prefill else fill().generate_next_token
    return Engine("onnxruntime-genai", "int4", step, size // 2 + size // 128 * 4)


def _qwen2(config: ModelConfig, folder: Path) -> int:
    """Saves a random Qwen2 with a tokenizer of two words and returns the elements of its
    products."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=config.vocab,
            hidden_size=config.hidden,
            intermediate_size=config.ffn,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_length,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    model.save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a"))
    wrap: Any = PreTrainedTokenizerFast  # untyped
    wrap(tokenizer_object=words, bos_token="a", eos_token="b", pad_token="a").save_pretrained(
        folder
    )
    return _linear_bytes(model) // 4


def _converted(source: Path, target: Path) -> Path:
    """Converts the model by GenAI's builder in a process of its own, for as many threads as
    ours."""
    words = ["-i", source, "-o", target, "-c", target / "cache", "-p", "int4", "-e", "cpu"]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "onnxruntime_genai.models.builder",
            *map(str, words),
            "--extra_options",
            "block_size=128",
        ],
        check=True,
        capture_output=True,
    )
    file = target / "genai_config.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    facts["model"]["decoder"]["session_options"]["intra_op_num_threads"] = torch.get_num_threads()
    file.write_text(json.dumps(facts), encoding="utf-8")
    return target
