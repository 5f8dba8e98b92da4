"""Checks a backend's whole decode steps on its own device: against its ops called one by one, and
against the reference in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm_core.backends.base import Backend
from glm_core.backends.registry import use
from glm_core.conformance.decode import IDLE, decoded
from glm_core.model.glm import GLM
from glm_core.model.presets import preset
from glm_core.model.prompt import Prompt, causal
from glm_core.model.quantize import Quantization, convert

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
            exact = _logits(model, whole=False)
            error = _error(_logits(model.to(dtype), whole=False), exact)
        model = model.to(backend.device())
        with use(backend) as session:
            ops, whole = _logits(model, whole=False), _logits(model, whole=True)
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


def _logits(model: GLM, whole: bool) -> Tensor:
    """Returns the logits [steps, B, V] of three sequences in float64 on the host, without those of
    the idle row."""
    prompts = [causal(range(5)), Prompt(tuple(range(90)), sep=60, mask=2), causal(range(300))]
    logits, _ = decoded(model, prompts, STEPS, whole=whole)
    logits[IDLE] = logits[IDLE][1:]
    return torch.cat(logits).cpu().double()


def _error(logits: Tensor, exact: Tensor) -> float:
    return float((logits - exact).norm() / exact.norm())
