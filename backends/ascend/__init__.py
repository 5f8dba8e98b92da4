"""Declares the Ascend backend: torch_npu's fused operators (CANN), other ops by torch on the
device.

We never ran it on hardware. Its values are verified by running every conformance case over a model
of torch_npu's operators (tests/shared/npu_model.py). A dry run checks every call, whole training
steps included, against the schemas and meta kernels of the real torch_npu 2.13.0 wheel
(tests/peers/npu_dry_run.py).

Ascend's operators differ from ours as follows; the code below allows for it, and `supports.py` or a
comment names the source.

- npu_geglu gates the second half only with activate_left=False, and uses tanh unless approximate=0.
- gelu ignores `approximate` in some builds; npu_gelu does not.
- True in npu_fusion_attention's mask hides a key.
- npu_rotary_mul rounds its tables to the input's dtype.
- npu_apply_adam_w computes 1 - beta2 in float32, so it is not used.
- npu_cross_entropy_loss returns losses in the logits' dtype.
- npu_add_rms_norm has no derivative and no alpha.
- Norms of half-precision tensors round a second time, before the product with the weight (ops-nn
  norm/add_rms_norm/op_kernel).

Shapes: B batch, L queries, S keys, H heads, E head dim, P pairs of a rotary section, D width, F
features, V vocabulary, N rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from glm_core import ops
from glm_core.backends.ascend import autograd, chip, loss, supports
from glm_core.backends.ascend.availability import probe
from glm_core.backends.base import Backend, Peak
from glm_core.ops.precision import wide

_npu = torch.ops.npu  # torch_npu's operators; looked up at the call, so that nothing is imported


class AscendBackend(Backend):
    """The backend of Ascend NPUs, which knows the chips' published peaks."""

    def peak(self, dtype: torch.dtype) -> Peak | None:
        """Returns the chip's peak, None where no public figure is known."""
        return chip.peak(dtype)


backend = AscendBackend(
    name="ascend",
    device_type="npu",
    probe=probe,
    collective="hccl",
    verified="by value over a model of torch_npu's operators; dry-run with the real torch_npu; "
    "never run on hardware",
    # gradients of norm weights are summed in no fixed order (ops-nn aclnnRmsNormGrad.md)
    deterministic=False,
)


@backend.implements(ops.rms_norm, supports.rms_norm)
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return _npu.npu_rms_norm(x, weight, eps)[0]


@backend.implements(ops.layer_norm, supports.layer_norm)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


@backend.implements(ops.add_rms_norm, supports.add_rms_norm)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    if alpha == 1.0:
        return autograd.AddRmsNorm.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
            x, residual, weight, eps
        )
    total = _scaled_sum(x, residual, alpha)
    return rms_norm(total, weight, eps), total


@backend.implements(ops.add_layer_norm, supports.add_layer_norm)
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    if alpha == 1.0:
        y, _, _, total = _npu.npu_add_layer_norm(x, residual, weight, bias, eps, True)
        return y, total
    total = _scaled_sum(x, residual, alpha)
    return layer_norm(total, weight, bias, eps), total


def _scaled_sum(x: Tensor, residual: Tensor, alpha: float) -> Tensor:
    """Returns x + alpha * residual, summed in float32 and rounded once; the fused operators have no
    alpha."""
    return torch.add(wide(x), wide(residual), alpha=alpha).to(x.dtype)


@backend.implements(ops.gelu, supports.gelu)
def gelu(x: Tensor) -> Tensor:
    return _npu.npu_gelu(x, approximate="tanh")


@backend.implements(ops.geglu, supports.geglu)
def geglu(x: Tensor) -> Tensor:
    return _npu.npu_geglu(x, -1, 0, False)[0]  # dim, erf, gate the second half


@backend.implements(ops.swiglu, supports.swiglu)
def swiglu(x: Tensor) -> Tensor:
    return _npu.npu_swiglu(x.contiguous(), -1)


@backend.implements(ops.rope, supports.rope)
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    sections, width = cos.shape[-2], 2 * cos.shape[-1]
    parts = [
        _rotated(x[..., g * width : (g + 1) * width], cos[:, :, g], sin[:, :, g], interleaved)
        for g in range(sections)
    ]
    return torch.cat([*parts, x[..., sections * width :]], -1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates one section x [B, L, H, 2P] by tables [B or 1, L, P]. Batch and sequence become one
    axis, since with interleaved pairs the operator's tables may not have a batch. Computes in
    float32, since the operator rounds its tables to x's dtype (op-plugin
    RotaryMulKernelNpuOpApi.cpp)."""
    b, n, h, width = x.shape

    def table(t: Tensor) -> Tensor:
        full = t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1)
        return full.expand(b, n, width).reshape(1, b * n, 1, width)  # [1, B * L, 1, 2P]

    rows = wide(x).reshape(1, b * n, h, width)  # [1, B * L, H, 2P]
    mode = "interleave" if interleaved else "half"
    y = _npu.npu_rotary_mul(rows, table(cos), table(sin), mode).view(x.shape)  # [B, L, H, 2P]
    return y.to(x.dtype)


@backend.implements(ops.embedding, supports.embedding)
def embedding(ids: Tensor, weight: Tensor, shrink: float = 1.0) -> Tensor:
    return autograd.ShrunkEmbedding.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        ids, weight, shrink
    )


@backend.implements(ops.linear, supports.linear)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(x, weight, bias)


@backend.implements(ops.grouped_linear, supports.grouped_linear)
def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return autograd.GroupedLinear.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        rows.contiguous(), weight.contiguous(), counts
    )


@backend.implements(ops.quantized_grouped_linear, supports.quantized_grouped_linear)
def quantized_grouped_linear(
    rows: Tensor,
    weight: Tensor,
    scale: Tensor,
    counts: Tensor,
    bits: int = 8,
    activation_bits: int = 16,
) -> Tensor:
    return autograd.QuantizedGroupedLinear.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        rows.contiguous(), weight.contiguous(), scale.flatten(1).contiguous(), counts
    )


@backend.implements(ops.quantized_linear, supports.quantized_linear)
def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    bits: int = 8,
    activation_bits: int = 16,
) -> Tensor:
    frozen = None if bias is None else bias.detach().contiguous()
    rows = x.reshape(-1, x.shape[-1])  # [N, D]
    y = autograd.QuantizedLinear.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        rows, weight if bits == 4 else weight.contiguous(), scale, frozen, bits
    )
    return y.view(*x.shape[:-1], len(weight))  # [..., F]


@backend.implements(ops.attention, supports.attention)
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
    # layer_scale and pb_relax keep half-precision scores in range; the operator's are float32.
    # The mask takes B * L * S bytes, one for all heads: the operator's compressed masks (sparse
    # modes 2 to 8) take prefix lengths on the host, which would wait for the device.
    j = torch.arange(k.shape[1], device=q.device, dtype=torch.int32)
    hidden = (j < key_start[..., None]) | (j >= key_end[..., None])  # [B, L, S], True hides
    y = _npu.npu_fusion_attention(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        q.shape[2],
        "BSND",
        atten_mask=hidden.unsqueeze(1),  # [B, 1, L, S]
        scale=scale,
        inner_precise=2,  # allows rows that see no key
    )[0]
    return y.masked_fill((key_end <= key_start)[..., None, None], 0.0)


@backend.implements(ops.linear_cross_entropy, supports.linear_cross_entropy)
def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    return loss.LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        x, weight, labels, token_weight
    )


@backend.implements(ops.global_norm, supports.global_norm)
def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(t, dtype=torch.float32) for t in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))


@backend.implements(ops.adamw, supports.adamw)
def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grad_scale: Tensor,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    copies: Sequence[Tensor] | None = None,
) -> None:
    full = [i for i, p in enumerate(params) if p.numel()]
    p, m, v = ([table[i] for i in full] for table in (params, exp_avgs, exp_avg_sqs))
    g = [grads[i].float() * grad_scale for i in full]
    if full:
        _adamw(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay)
    for copy, param in zip(copies or (), params, strict=False):
        copy.copy_(param)


def _adamw(
    p: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Updates all tensors at once. npu_apply_adam_w is not used: it computes 1 - beta from a
    float32 beta (ops-nn optim/apply_adam_w/op_kernel), which is off by 1.3e-5 for 0.999, and
    conformance finds it; it also wants beta^(t-1), and rounds its scalars to the gradient's
    dtype."""
    torch._foreach_mul_(m, beta1)
    torch._foreach_add_(m, g, alpha=1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, 1 - beta2)
    scale = torch._foreach_div(v, 1 - beta2**step)
    torch._foreach_sqrt_(scale)
    torch._foreach_add_(scale, eps)
    torch._foreach_mul_(p, 1 - lr * weight_decay)
    torch._foreach_addcdiv_(p, m, scale, -lr / (1 - beta1**step))


for _name in supports.NO_CALL:
    _op = ops.all_ops()[_name]
    backend.implements(_op, supports.refusal(_name))(_op.reference)
