"""Runs attention by our Triton kernels, as operators of torch: autograd, fake tensors and
torch.compile see them like any other. No mask is built and no length or scale leads to another
compilation (docs/adr/0013-attention-in-triton.md).

Shapes: B batch, L queries, S keys, H heads, K kv heads, E head dim, C head dim of the values."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from glm_core import dispatch
from glm_core.backends.cuda import probe
from glm_core.spec import Support, unsupported

Three = tuple[Tensor, Tensor, Tensor]
HAS_TRITON = importlib.util.find_spec("triton") is not None
MAX_HEAD_SIZE = 256
LATENT = (576, 512)
"""the largest head sizes of keys and values without gradients, in half precision: those of latent
attention that is absorbed"""
TRITON_SINCE = {"gfx900": (3, 8), "gfx906": (3, 8)}
"""chips that older versions of Triton refuse, and the first that we saw to compile for them"""

MATRIX_CORES = ("gfx908", "gfx90a", "gfx940", "gfx941", "gfx942", "gfx950")
"""AMD's architectures with matrix cores for float32, too"""


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_start: Tensor, key_end: Tensor, scale: float
) -> Three:
    """Returns y [B, L, H, C], and per row of scores the maximum and the reciprocal sum [B, H, L]
    float32."""
    from glm_core.backends.cuda import attention_launch

    return attention_launch.forward(q, k, v, key_start, key_end, scale)


def backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    y: Tensor,
    tops: Tensor,
    shares: Tensor,
    scale: float,
) -> Three:
    """Returns dq, dk and dv, from dy and what `forward` took and returned."""
    from glm_core.backends.cuda import attention_launch

    return attention_launch.backward(dy, q, k, v, key_start, key_end, y, tops, shares, scale)


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, key_start: Tensor, key_end: Tensor, scale: float
) -> Three:
    tops, shares = (
        q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32) for _ in range(2)
    )
    return q.new_empty(*q.shape[:3], v.shape[-1]), tops, shares


def _fake_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Three:
    return _like(q), _like(k), _like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    *tensors, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    grads = _operators.attention_backward.default(dy, *ctx.saved_tensors, ctx.scale)
    return (*grads, None, None, None)


_library = torch.library.Library("glm_core_gpu", "DEF")
"""torch drops the operators with this object"""
_operators = torch.ops.glm_core_gpu
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor key_start, Tensor key_end, float scale)"
    " -> (Tensor y, Tensor tops, Tensor shares)"
)
_library.define(
    "attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor key_start, Tensor key_end,"
    " Tensor y, Tensor tops, Tensor shares, float scale) -> (Tensor dq, Tensor dk, Tensor dv)"
)
_library.impl("attention", forward, "CUDA")
_library.impl("attention_backward", backward, "CUDA")
torch.library.register_fake("glm_core_gpu::attention", _fake_forward, lib=_library)
torch.library.register_fake("glm_core_gpu::attention_backward", _fake_backward, lib=_library)
torch.library.register_autograd(
    "glm_core_gpu::attention", _gradients, setup_context=_keep, lib=_library
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    scale: float,
    layer_scale: float = 1.0,
    pb_relax: float = 0.0,
) -> Tensor:
    # layer_scale and pb_relax keep half-precision scores in range; the kernels' are float32
    if dispatch.session().exact:
        exact: Tensor = torch.ops.glm_core.attention.default(q, k, v, key_start, key_end, scale)
        return exact
    if scale < 0:  # the kernels' maximum is that of q k^T
        q, scale = -q, -scale
    y: Tensor = _operators.attention.default(q, k, v, key_start, key_end, scale)[0]
    return y


@functools.cache
def chip_trouble(architecture: str) -> str:
    """Says why Triton compiles nothing for this chip; '' where it does."""
    import triton

    since, here = TRITON_SINCE.get(architecture, (0, 0)), triton.__version__
    if tuple(map(int, here.split(".")[:2])) >= since:
        return ""
    need = "{}.{}".format(*since)
    return f"Triton {here} does not compile for {architecture}; install triton {need} or newer"


def trouble(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Says why the kernels cannot run for these tensors; '' where they can."""
    if not HAS_TRITON:
        return "attention's kernels need Triton, which is not installed; pip install triton"
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_SIZE and (reason := _wide(q, k, v)):
        return reason
    if q.is_cuda and not torch.compiler.is_compiling() and not is_fake(q):
        return chip_trouble(probe.architecture(q.device.index or 0))
    return ""


def _wide(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Says why heads wider than MAX_HEAD_SIZE have no kernel; '' where they have."""
    sizes = f"head sizes {q.shape[-1]} and {v.shape[-1]}"
    if q.shape[-1] > LATENT[0] or v.shape[-1] > LATENT[1] or q.shape[-1] % 8 or v.shape[-1] % 8:
        most = "multiples of 8 up to {} and {}".format(*LATENT)
        return f"{sizes}: the kernels take 1 to {MAX_HEAD_SIZE}, and {most} without gradients"
    if q.dtype == torch.float32 or torch.version.hip:
        return f"{sizes}: above {MAX_HEAD_SIZE} the kernels need half precision on NVIDIA's chips"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return f"{sizes}: above {MAX_HEAD_SIZE} the kernels have no gradient; expand the latents"
    return ""


def supports(takes: Callable[..., Support]) -> Callable[..., Support]:
    """Returns attention's predicate; `takes` is the rule of all kernels, on devices and dtypes."""

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_start: Tensor,
        key_end: Tensor,
        scale: float,
        layer_scale: float = 1.0,
        pb_relax: float = 0.0,
    ) -> Support:
        support = takes(q, k, v, key_start, key_end, scale, layer_scale, pb_relax)
        ours = not dispatch.session().exact  # exact kernels take heads of any size
        reason = trouble(q, k, v) if support.ok and ours else ""
        return unsupported(reason) if reason else support

    return attention
