"""Checks a backend's whole decode steps on its own device: against its ops called one by one, and
against the reference in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm_core import dispatch
from glm_core.backends.base import Backend
from glm_core.backends.registry import use
from glm_core.model.glm import GLM
from glm_core.model.presets import preset
from glm_core.model.prompt import Prompt, causal
from glm_core.model.quantize import Quantization, convert
from glm_core.model.runner import DecodeRow, Runner, idle

STEPS, VOCAB, LENGTH = 6, 512, 512
MAX_ERROR_RATIO = 2.0
PRECISIONS: dict[str, Quantization | None] = {
    "plain": None,
    "int8": Quantization(bits=8),
    "int4": Quantization(bits=4, group=128),
}


def check(backend: Backend, dtype: torch.dtype) -> dict[str, Any]:
    """Returns, per precision, how far logits are from float64 and how far the reference in `dtype`
    is (root mean squares, relative), how many of the whole steps' logits differ from those of the
    ops one by one, and why steps were taken op by op. Good is: none, and at most MAX_ERROR_RATIO
    times the reference's error."""
    found: dict[str, Any] = {}
    for name, how in PRECISIONS.items():
        model = _model(how).double()
        with use("reference"):
            exact = decoded(model, watch=True)
            error = _error(decoded(model.to(dtype), watch=True), exact)
        model = model.to(backend.device())
        with use(backend) as session:
            ops, whole = decoded(model, watch=True), decoded(model, watch=False)
        differing, ours = int((whole != ops).sum()), _error(whole, exact)
        found[name] = {
            "ok": not differing and ours <= MAX_ERROR_RATIO * error,
            "differing": differing,
            "error": ours,
            "reference_error": error,
            "fallbacks": {f"{f.op}: {f.reason}": n for f, n in session.fallbacks.items()},
        }
    return found


def _model(how: Quantization | None) -> GLM:
    """Returns two layers in the shapes of GLM-4, wide enough for every product's own kernel."""
    sizes = {"num_layers": 2, "hidden": 512, "num_heads": 4, "head_dim": 128, "ffn": 1024}
    small = preset("glm-4-9b", **sizes, num_kv_heads=2, vocab=VOCAB, max_length=LENGTH)
    model = GLM(small).init_weights(7).requires_grad_(False)
    for _ in convert(model, how) if how else ():
        pass
    return model


def decoded(model: GLM, watch: bool) -> Tensor:
    """Returns the logits [steps, B, V] of three sequences of different lengths, in float64 on the
    host; one of them is idle once. watch: the ops are called one by one."""
    prompts = [causal(range(5)), Prompt(tuple(range(90)), sep=60, mask=2), causal(range(300))]
    runner, logits = Runner(model, len(prompts), LENGTH), []
    for b, prompt in enumerate(prompts):
        runner.prefill(b, [prompt])
    for step in range(STEPS):
        fed = [DecodeRow(30 + step + b, p, len(p.tokens) + step) for b, p in enumerate(prompts)]
        if step == 2:
            fed[0] = idle(len(prompts[0].tokens) + step)
        with dispatch.intercept(dispatch.run if watch else None):
            result = runner.decode(fed)
        # what an idle row gives is ignored
        logits.append(result[1:].cpu().double() if step == 2 else result.cpu().double())
    return torch.cat(logits)


def _error(logits: Tensor, exact: Tensor) -> float:
    return float((logits - exact).norm() / exact.norm())
