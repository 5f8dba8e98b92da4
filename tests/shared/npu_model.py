"""A model of torch_npu's operators in plain torch on the CPU: semantics from their public
documentation, limits refused as documented, so that argument order, layouts and masks of the
ascend backend are tested by value. `npu_attention_model.register` defines `torch.ops.npu.*`.

Sources: torch_npu/_op_plugin_docs.py and the wheel's schemas (2.13.0; tests/peers compares them),
Ascend/op-plugin config/derivatives.yaml for the derivatives, gitcode.com/cann/ops-nn for the
formulas (docs/aclnn*.md) and for where half precision is rounded in between (op_kernel/).
Shapes: B batch, S sequence, N heads, D head dim, C classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SCHEMAS = """
npu_rms_norm(Tensor input, Tensor gamma, float epsilon=9.9999999999999995e-07) -> (Tensor, Tensor)
npu_rms_norm_backward(Tensor dy, Tensor input, Tensor gamma, Tensor rstd) -> (Tensor, Tensor)
npu_add_rms_norm(Tensor x1, Tensor x2, Tensor gamma, float epsilon=9.9999999999999995e-07)
 -> (Tensor, Tensor, Tensor)
npu_add_layer_norm(Tensor x1, Tensor x2, Tensor gamma, Tensor beta,
 float epsilon=1.0000000000000001e-05, bool additional_output=False)
 -> (Tensor, Tensor, Tensor, Tensor)
npu_add_layer_norm_backward(Tensor? dy_opt, Tensor x1, Tensor x2, Tensor rstd, Tensor mean,
 Tensor gamma, Tensor? dsum_opt) -> (Tensor, Tensor, Tensor, Tensor)
npu_gelu(Tensor input, *, str approximate="none") -> Tensor
npu_gelu_backward(Tensor grad_output, Tensor input, *, str approximate="none") -> Tensor
npu_geglu(Tensor input, int dim=-1, int approximate=1, bool activate_left=False)
 -> (Tensor, Tensor)
npu_geglu_grad(Tensor grad_output, Tensor input, Tensor gelu, int dim=-1, int approximate=1,
 bool activate_left=False) -> Tensor
npu_swiglu(Tensor input, int dim=-1) -> Tensor
npu_swiglu_backward(Tensor grad_output, Tensor input, int dim=-1) -> Tensor
npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode="half", Tensor? rotate=None)
 -> Tensor
npu_rotary_mul_backward(Tensor grad, Tensor input, Tensor r1, Tensor r2, str rotary_mode="half")
 -> (Tensor, Tensor, Tensor)
npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout,
 Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1.,
 float keep_prob=1., int pre_tockens=2147483647, int next_tockens=2147483647,
 int inner_precise=0, int[]? prefix=None, int[]? actual_seq_qlen=None,
 int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, bool sync=False,
 str softmax_layout="", Tensor? sink=None, Tensor? dropout_mask=None, int seed=0, int offset=0)
 -> (Tensor, Tensor, Tensor, Tensor, int, int, int)
npu_fusion_attention_grad(Tensor query, Tensor key, Tensor value, Tensor dy, int head_num,
 str input_layout, *, Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None,
 Tensor? softmax_max=None, Tensor? softmax_sum=None, Tensor? softmax_in=None,
 Tensor? attention_in=None, float scale_value=1., float keep_prob=1.,
 int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int seed=0,
 int offset=0, int numels=0, int[]? prefix=None, int[]? actual_seq_qlen=None,
 int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, bool sync=False,
 str softmax_layout="", Tensor? sink=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)
npu_cross_entropy_loss(Tensor input, Tensor target, Tensor? weight=None, str reduction="mean",
 int ignore_index=-100, float label_smoothing=0., float lse_square_scale_for_zloss=0.,
 bool return_zloss=False) -> (Tensor, Tensor, Tensor, Tensor)
npu_cross_entropy_loss_backward(Tensor grad_loss, Tensor log_prob, Tensor target,
 Tensor? weight=None, Tensor? grad_zloss=None, Tensor? lse_for_zloss=None,
 str reduction="mean", int ignore_index=-100, float label_smoothing=0.,
 float lse_square_scale_for_zloss=0.) -> Tensor
npu_weight_quant_batchmatmul(Tensor x, Tensor weight, Tensor antiquant_scale,
 Tensor? antiquant_offset=None, Tensor? quant_scale=None, Tensor? quant_offset=None,
 Tensor? bias=None, int antiquant_group_size=0, int inner_precise=0, int? weight_dtype=None)
 -> Tensor
npu_convert_weight_to_int4pack(Tensor weight, int inner_k_tiles=0) -> Tensor
npu_grouped_matmul(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, Tensor[]? scale=None,
 Tensor[]? offset=None, Tensor[]? antiquant_scale=None, Tensor[]? antiquant_offset=None,
 Tensor[]? per_token_scale=None, Tensor? group_list=None, Tensor[]? activation_input=None,
 Tensor[]? activation_quant_scale=None, Tensor[]? activation_quant_offset=None,
 int? split_item=0, int? group_type=None, int? group_list_type=0, int? act_type=0,
 int[]? tuning_config=None, int? output_dtype=None, int? x_dtype=None, int? weight_dtype=None,
 int? scale_dtype=None, int? per_token_scale_dtype=None) -> Tensor[]
npu_apply_adam_w.out(Scalar beta1_power, Scalar beta2_power, Scalar lr, Scalar weight_decay,
 Scalar beta1, Scalar beta2, Scalar epsilon, Tensor grad, Tensor? max_grad_norm, bool? amsgrad,
 bool? maximize, *, Tensor[] out) -> (Tensor, Tensor, Tensor)
"""
_APPROXIMATE = ("none", "tanh")


def schemas() -> list[str]:
    """One line each."""
    return SCHEMAS.strip().replace("\n ", " ").splitlines()


def one_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype all share, one of the three that the operators take."""
    (dtype,) = {t.dtype for t in tensors}
    assert dtype in (torch.float32, torch.bfloat16, torch.float16), dtype
    return dtype


def _scaled(normal: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded before the product with gamma: norm/add_rms_norm/op_kernel/add_rms_norm.h."""
    return normal.to(dtype).float() * gamma.float()


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """y, 1 / rms [.., 1] float32."""
    dtype = one_dtype(input, gamma)
    x = input.float()
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return _scaled(x * rstd, gamma, dtype).to(dtype), rstd


def npu_rms_norm_backward(
    dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """dx in x's dtype, dgamma in float32; gamma before rstd, unlike aclnnRmsNormGrad."""
    assert rstd.dtype == torch.float32
    assert gamma.shape == input.shape[-1:]
    normal = input.float() * rstd
    dnormal = dy.float() * gamma.float()
    dx = rstd * (dnormal - normal * (dnormal * normal).mean(-1, keepdim=True))
    return dx.to(input.dtype), (dy.float() * normal).flatten(0, -2).sum(0)


def _sum(x1: Tensor, x2: Tensor) -> Tensor:
    """float32; float16 is added in float16, bfloat16 in float32 (add_rms_norm.h)."""
    half = x1.dtype == torch.float16
    return (x1 + x2).float() if half else x1.float() + x2.float()


def npu_add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, 1 / rms, x1 + x2; the sum is normalised before it is rounded (add_rms_norm.h)."""
    dtype = one_dtype(x1, x2, gamma)
    total = _sum(x1, x2)
    rstd = torch.rsqrt(total.square().mean(-1, keepdim=True) + epsilon)
    return _scaled(total * rstd, gamma, dtype).to(dtype), rstd, total.to(dtype)


def npu_add_layer_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor, epsilon: float, additional_output: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, mean, 1 / standard deviation, x1 + x2 (nothing useful without additional_output)."""
    dtype = one_dtype(x1, x2, gamma, beta)
    total = _sum(x1, x2)
    mean = total.mean(-1, keepdim=True)
    rstd = torch.rsqrt((total - mean).square().mean(-1, keepdim=True) + epsilon)
    y = (total - mean) * rstd * gamma.float() + beta.float()
    kept = total.to(dtype) if additional_output else torch.full_like(x1, torch.nan)
    return y.to(dtype), mean, rstd, kept


def npu_add_layer_norm_backward(
    dy: Tensor | None,
    x1: Tensor,
    x2: Tensor,
    rstd: Tensor,
    mean: Tensor,
    gamma: Tensor,
    dsum: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx1, dx2 (the same values), dgamma, dbeta in float32."""
    dy = torch.zeros_like(x1) if dy is None else dy
    normal, dnormal = (_sum(x1, x2) - mean) * rstd, dy.float() * gamma.float()
    inner = dnormal - dnormal.mean(-1, keepdim=True)
    dx = rstd * (inner - normal * (dnormal * normal).mean(-1, keepdim=True))
    dx = dx if dsum is None else dx + dsum.float()
    dgamma = (dy.float() * normal).flatten(0, -2).sum(0)
    return dx.to(x1.dtype), dx.to(x1.dtype), dgamma, dy.float().flatten(0, -2).sum(0)


def layer_norm(
    x: Tensor, shape: tuple[int, ...], weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """torch's layer_norm as CANN computes it (aclnnLayerNorm): in float32, rounded once. torch's
    own on the CPU sums the gradients of half-precision weights in half precision."""
    wide = functional.layer_norm(x.float(), shape, weight.float(), bias.float(), eps)
    return wide.to(x.dtype)


def npu_gelu(input: Tensor, *, approximate: str) -> Tensor:
    """In float32, rounded once."""
    return functional.gelu(input.float(), approximate=approximate).to(input.dtype)


def npu_gelu_backward(grad_output: Tensor, input: Tensor, *, approximate: str) -> Tensor:
    """dx."""
    x = input.float()
    dx = torch.ops.aten.gelu_backward(grad_output.float(), x, approximate=approximate)
    return dx.to(input.dtype)


def _halves(input: Tensor, dim: int, activate_left: bool) -> tuple[Tensor, Tensor]:
    """(linear, gate): the gate is the right half unless activate_left (aclnnGeGluV3.md)."""
    left, right = input.float().chunk(2, dim)
    return (right, left) if activate_left else (left, right)


def npu_geglu(
    input: Tensor, dim: int, approximate: int, activate_left: bool
) -> tuple[Tensor, Tensor]:
    """linear * gelu(gate), gelu(gate); approximate 0 is erf, 1 is tanh."""
    linear, gate = _halves(input, dim, activate_left)
    gelu = functional.gelu(gate, approximate=_APPROXIMATE[approximate])
    return (linear * gelu).to(input.dtype), gelu.to(input.dtype)


def npu_geglu_grad(
    grad_output: Tensor,
    input: Tensor,
    gelu: Tensor,
    dim: int,
    approximate: int,
    activate_left: bool,
) -> Tensor:
    """dx; the gelu of the forward pass comes back rounded."""
    linear, gate = _halves(input, dim, activate_left)
    dy = grad_output.float()
    dgate = torch.ops.aten.gelu_backward(dy * linear, gate, approximate=_APPROXIMATE[approximate])
    parts = [dy * gelu.float(), dgate]
    return torch.cat(parts[::-1] if activate_left else parts, dim).to(input.dtype)


def npu_swiglu(input: Tensor, dim: int) -> Tensor:
    """swish(first half) * second half; aclnnSwiGlu takes contiguous tensors only."""
    assert input.is_contiguous()
    gate, linear = input.float().chunk(2, dim)
    return (functional.silu(gate) * linear).to(input.dtype)


def npu_swiglu_backward(grad_output: Tensor, input: Tensor, dim: int) -> Tensor:
    """dx."""
    gate, linear = input.float().chunk(2, dim)
    dy = grad_output.float()
    dgate = torch.ops.aten.silu_backward(dy * linear, gate)
    return torch.cat([dgate, dy * functional.silu(gate)], dim).to(input.dtype)


def _rotated(x: Tensor, mode: str) -> Tensor:
    if mode == "half":
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str, rotate: Tensor | None
) -> Tensor:
    """x r1 + rotated(x) r2, tables rounded to x's dtype (RotaryMulKernelNpuOpApi.cpp)."""
    b, s, n, d = input.shape  # BSND
    assert rotary_mode in ("half", "interleave")
    assert rotate is None
    assert d % 2 == 0
    assert d < 896
    assert b < 1000
    assert n < 1000
    shapes = [(1, s, 1, d)]
    if rotary_mode == "half":
        shapes += [(b, s, 1, d), (b, s, n, d)]
    assert r1.shape == r2.shape
    assert tuple(r1.shape) in shapes, (r1.shape, rotary_mode)
    assert all((t[t.isfinite()].abs() <= 1).all() for t in (r1, r2)), "outside [-1, 1]"
    cos, sin = r1.to(input.dtype).float(), r2.to(input.dtype).float()
    x = input.float()
    return (x * cos + _rotated(x, rotary_mode) * sin).to(input.dtype)


def npu_rotary_mul_backward(
    grad: Tensor, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """dx; the gradients of the tables are not modelled."""
    cos, sin = r1.to(input.dtype).float(), r2.to(input.dtype).float()
    dy = grad.float()
    dx = dy * cos - _rotated(dy * sin, rotary_mode)
    return dx.to(input.dtype), torch.full_like(r1, torch.nan), torch.full_like(r2, torch.nan)


def npu_cross_entropy_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss and log-probabilities, both in the input's dtype; [N, C], [N]."""
    assert input.dim() == 2
    assert target.dtype == torch.int64
    assert weight is None
    log_prob = torch.log_softmax(input.float(), -1)
    loss = functional.nll_loss(log_prob, target, reduction=reduction)
    empty = input.new_empty(0)
    shape = (-1,) if reduction == "none" else (1,)
    return loss.to(input.dtype).reshape(shape), log_prob.to(input.dtype), empty, empty.clone()


def npu_cross_entropy_loss_backward(
    grad_loss: Tensor,
    log_prob: Tensor,
    target: Tensor,
    weight: Tensor | None,
    grad_zloss: Tensor | None,
    lse: Tensor | None,
    reduction: str,
    *_: Any,
) -> Tensor:
    """(softmax - one-hot) * grad, for reduction none."""
    assert reduction == "none"
    assert grad_loss.shape == target.shape
    hot = functional.one_hot(target, log_prob.shape[1])
    return ((log_prob.float().exp() - hot) * grad_loss.float()[:, None]).to(log_prob.dtype)


_NIBBLES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
"""the model's own: torch_npu does not tell its order, so nothing may rely on one"""


def npu_convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int) -> Tensor:
    """int32 codes [K, N] in -8..7 to int32 [K, N / 8]."""
    assert weight.dtype == torch.int32
    assert weight.is_contiguous()
    assert weight.shape[1] % 8 == 0
    assert weight.abs().max() <= 8
    nibbles = (weight.unflatten(1, (-1, 8)).long() & 15) << (4 * _NIBBLES)
    return nibbles.sum(-1).to(torch.int32)


def _codes(packed: Tensor) -> Tensor:
    nibbles = (packed.long()[..., None] >> (4 * _NIBBLES)) & 15
    return ((nibbles ^ 8) - 8).flatten(-2).to(torch.int8)


def npu_weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None,
    quant_scale: Tensor | None,
    quant_offset: Tensor | None,
    bias: Tensor | None,
    group: int,
    *rest: Any,
) -> Tensor:
    """x [M, K] times the codes [K, N] times scale [1 or K / group, N]; the dequantised weight is
    rounded to x's dtype, as it must be to enter the matrix unit."""
    dtype = one_dtype(x, antiquant_scale, *([] if bias is None else [bias]))
    if weight.dtype == torch.int32:
        weight = _codes(weight)
    (m, k), (k2, n) = x.shape, weight.shape
    assert dtype == torch.float16
    assert (antiquant_offset, quant_scale, quant_offset, rest[0]) == (None, None, None, 0)
    assert weight.dtype == torch.int8
    assert k == k2
    assert m >= 1
    assert group == 0 or (32 <= group < k and group % 32 == 0)
    assert antiquant_scale.shape == (k // group if group else 1, n)
    scale = antiquant_scale.float().repeat_interleave(group or k, 0)
    w = (weight.float() * scale).to(dtype).float()
    y = x.float() @ w
    return (y if bias is None else y + bias.float()).to(dtype)


def npu_apply_adam_w(
    beta1_power: float,
    beta2_power: float,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    grad: Tensor,
    max_grad_norm: Tensor | None,
    amsgrad: bool | None,
    maximize: bool | None,
    *,
    out: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """var, m, v in place; beta^t = beta_power * beta (aclnnApplyAdamW.md), scalars rounded to the
    gradient's dtype (ApplyAdamWKernelNpuOpApi.cpp)."""
    var, m, v = out
    one_dtype(grad, *out)
    assert not amsgrad
    assert not maximize
    names = (beta1_power, beta2_power, lr, weight_decay, beta1, beta2, epsilon)
    p1, p2, lr, decay, b1, b2, eps = (torch.tensor(s, dtype=grad.dtype) for s in names)
    m.mul_(b1).add_(grad * (1 - b1))
    v.mul_(b2).add_(grad.square() * (1 - b2))
    step = lr * (m / (1 - p1 * b1)) / ((v / (1 - p2 * b2)).sqrt() + eps)
    var.mul_(1 - lr * decay).sub_(step)
    return var.clone(), m.clone(), v.clone()
