"""Runs what the goals of one device are compared with: transformers' decoding and training steps,
eager and compiled, on the same device, and our training steps beside them."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from glm_core.backends.base import Backend
from glm_core.bench import peers, step
from glm_core.config import ModelConfig
from glm_core.measure.ceilings import contestants, finished
from glm_core.measure.timing import Timing, interleave, ratio
from glm_core.model.presets import preset
from glm_core.spec import Support

Call = Callable[[], Any]
Sizes = tuple[int, int]
WIDE, NARROW = "train, wide layers", "train, small model"
"""4 layers of GLM-4-9B with 4 x 2,048 tokens, and 34M parameters with 4 x 256, but for the CPU"""
MISSING = "" if importlib.util.find_spec("transformers") else "pip install transformers"
"""what to do before there are peers; empty where there are"""


def decoders(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, room: int, turn: int
) -> dict[str, Call]:
    """Returns calls that decode `turn` tokens with transformers, eager and compiled with a static
    cache of `room` tokens. Both share one model, whose values are random."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = peers.glm(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    return {
        "eager": _decoder(model, model.forward, device, room, turn),
        "compiled": _decoder(model, _compiled(model.forward, device), device, room, turn),
    }


def _compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Compiles as transformers' users do for a static cache."""
    compiled: Callable[..., Any] = torch.compile(
        function, mode=None if device.type == "cpu" else "reduce-overhead", fullgraph=True
    )
    return compiled


def _decoder(
    model: Any, forward: Callable[..., Any], device: torch.device, room: int, turn: int
) -> Call:
    from transformers import StaticCache

    cache: Any = StaticCache(config=model.config, max_cache_len=room)
    text = torch.arange(room // 2, device=device)[None] % model.config.vocab_size
    token, left = text[:, :1].clone(), 0

    def fill() -> int:
        cache.reset()
        with torch.no_grad():
            model(input_ids=text, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return room - room // 2

    def decode() -> None:
        nonlocal token, left
        left = left if left >= turn else fill()
        with torch.no_grad():
            for _ in range(turn):
                logits = forward(input_ids=token, past_key_values=cache, use_cache=True).logits
                token = logits[:, -1:].argmax(-1).clone()
        left -= turn
        token.tolist()

    return decode


def trainings(backend: Backend) -> dict[str, tuple[ModelConfig, Sizes]]:
    """Returns the training steps of the goals, model, batch and length; on the CPU small ones,
    which show that the whole table can be made."""
    if backend.device_type == "cpu":
        narrow = {"hidden": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "ffn": 96}
        small = preset("glm-4-9b", num_layers=1, vocab=128, max_length=64, **narrow)
        return {WIDE: (small, (1, 32)), NARROW: (small, (2, 32))}
    wide = preset("glm-4-9b", num_layers=4, vocab=65024, max_length=2048)
    return {WIDE: (wide, (4, 2048)), NARROW: (preset("glm4-34m"), step.SIZES)}


def training_rows(backend: Backend, dtype: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Returns a row for each training step: ours, as a graph too where the backend records, and
    the peers', timed in turn with a product of large matrices."""
    return {
        name: _training_row(backend, dtype, rounds, config, sizes)
        for name, (config, sizes) in trainings(backend).items()
    }


def _training_row(
    backend: Backend, dtype: str, rounds: int, config: ModelConfig, sizes: Sizes
) -> dict[str, Any]:
    device, gemm = backend.device(), f"gemm {dtype}"
    product, product_flops, _ = contestants(backend, (getattr(torch, dtype),))[gemm]
    runs: dict[str, Call] = {gemm: finished(backend, product)}
    runs["step"] = step.ours(config, dtype, backend.name, sizes=sizes)
    if not isinstance(backend.graphs(device), Support):
        runs["graph"] = step.ours(config, dtype, backend.name, graph=True, sizes=sizes)
    if not MISSING:
        for kind in ("eager", "compiled"):
            runs[kind] = step.transformers_glm(config, dtype, kind == "compiled", device, sizes)
    timing = interleave(runs, rounds)
    best = min(("step", "graph"), key=lambda n: timing[n].median_s if n in timing else torch.inf)
    reached = step.matmul_flops(config, sizes) / timing[best].median_s
    row = {
        "ms": timing[best].median_s * 1e3,
        "fastest": best,
        "model": f"{config.num_layers} x {config.hidden}, {sizes[0]} x {sizes[1]} tokens",
        "tflops": reached / 1e12,
        "gemm_share": reached / (product_flops / timing[gemm].median_s),
        **{f"{n}_ms": t.median_s * 1e3 for n, t in timing.items()},
        **against_peers(timing, best),
    }
    del runs
    gc.collect()
    return row


def against_peers(timing: dict[str, Timing], ours: str) -> dict[str, float]:
    """Returns how many times faster ours is than each peer that was timed with it."""
    return {
        f"times_{kind}": ratio(timing[kind], timing[ours])["ratio"]
        for kind in ("eager", "compiled")
        if kind in timing
    }
