"""Declares the benign changes of a whole run: every op in another precision or order, another
backend, another micro-batch or number of threads."""

from __future__ import annotations

from typing import Any

from glm_core import ops
from glm_core.faults.embedding import precise_embedding
from glm_core.faults.fault import BENIGN, Benign
from glm_core.faults.flash import flash
from glm_core.faults.kernels import Kernels
from glm_core.faults.loss import chunked
from glm_core.faults.norm import both, layer_norm_by, native_rms_norm
from glm_core.faults.optim import foreach_adamw, precise_adamw
from glm_core.faults.rounding import pairwise, precise
from glm_core.faults.routing import precise_route

IN_FLOAT64 = (
    ops.linear,
    ops.geglu,
    ops.gelu,
    ops.swiglu,
    ops.rope,
    ops.attention,
    ops.linear_cross_entropy,
    ops.global_norm,
    ops.grouped_linear,
    ops.unpermute,
)
PRECISE: Kernels = {
    **{op.name: precise(op) for op in IN_FLOAT64},
    **both("layer", precise(ops.layer_norm)),
    **both("rms", precise(ops.rms_norm)),
    "adamw": precise_adamw,
    "embedding": precise_embedding,
    "route": precise_route,
}
REORDERED: Kernels = {
    "attention": flash(32, True),
    **both("rms", native_rms_norm),
    **both("layer", layer_norm_by(pairwise)),
    "adamw": foreach_adamw,
    "linear_cross_entropy": chunked(32),
}


def whole_run(name: str, description: str, kernels: Kernels | None = None, **rest: Any) -> None:
    """Declares a benign change of a whole run; the other arguments are Benign's fields."""
    BENIGN.append(Benign(name, "", description, kernels or {}, **rest))


whole_run("micro-batch-4", "two forwards of 4 sequences", micro_batch=4)
whole_run("micro-batch-2", "four forwards of 2 sequences", micro_batch=2, setup="glm4")
whole_run("threads-2", "two threads", threads=2, neutral=True)
for setup in ("130b", "glm4", "glm"):
    whole_run(f"all-float64-{setup}", "every op in float64 inside", PRECISE, setup=setup)
    for name in ("cpu", "onnxrt"):
        whole_run(f"{name}-{setup}", f"the {name} backend", registered=name, setup=setup)
whole_run("all-float64-moe", "every op in float64 inside", PRECISE, setup="moe")
whole_run("cpu-moe", "the cpu backend", registered="cpu", setup="moe")
for setup in ("130b", "glm4"):
    text = "flash attention, other norms, loss, AdamW"
    whole_run(f"all-reordered-{setup}", text, REORDERED, setup=setup)
