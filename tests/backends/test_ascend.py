"""Tests the values of the ascend backend over the model of torch_npu's operators in `npu_model.py`:
the ordinary conformance cases, and wrong calls of the operators that the cases must reject."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import npu_attention_model
import npu_model
import pytest
import torch
from torch import Tensor

from glm_core import ops
from glm_core.backends import ascend, registry
from glm_core.backends.ascend import chip
from glm_core.backends.base import Backend, always
from glm_core.config import ModelConfig, TrainConfig
from glm_core.conformance.case import Case, select
from glm_core.conformance.run import run_case
from glm_core.model.glm import GLM
from glm_core.model.presets import preset
from glm_core.training.optimizer import Optimizer

npu_attention_model.register()
BACKEND = dataclasses.replace(ascend.backend, device_type="cpu", probe=always)
CASES = {c.id: c for c in select(BACKEND, modes=("test", "grad"), real=False)}


@pytest.fixture(autouse=True)
def second_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the chip to an Atlas A2, unless a test sets another."""
    monkeypatch.setattr(chip, "name", lambda: "Ascend910B3")
    aten = SimpleNamespace(layer_norm=npu_model.layer_norm, linear=torch.nn.functional.linear)
    monkeypatch.setattr(ascend, "functional", aten)


def outcome(case: Case) -> tuple[str, str]:
    result = run_case(case, BACKEND)
    return result.outcome, result.reason


@pytest.mark.parametrize("id", CASES)
def test_conformance(id: str) -> None:
    result, reason = outcome(CASES[id])
    if result == "unsupported":
        pytest.skip(reason)
    assert result == "pass", reason


Wrong = Callable[..., Any]
_npu = torch.ops.npu
MISTAKES: dict[str, tuple[str, str, Wrong]] = {
    "rows are multiplied by another expert's weight": (
        "grouped_linear-float32-9x48-32-3experts-test",
        "npu_grouped_matmul",
        lambda x, w, **k: _npu.npu_grouped_matmul(x, [w[0].flip(0).mT.contiguous().mT], **k),
    ),
    "geglu gates the first half": (
        "geglu-float32-2x5x48-test",
        "npu_geglu",
        lambda x, dim, approximate, left: _npu.npu_geglu(x, dim, approximate, True),
    ),
    "geglu is tanh, its default": (
        "geglu-float32-2x5x48-test",
        "npu_geglu",
        lambda x, *_: _npu.npu_geglu(x),
    ),
    "geglu gradient of the wrong half": (
        "geglu-bfloat16-2x5x48-grad",
        "npu_geglu",
        lambda x, *_: _npu.npu_geglu(x, -1, 0, True),
    ),
    "gelu is erf, its default": (
        "gelu-float32-2x5x48-test",
        "npu_gelu",
        lambda x, approximate: _npu.npu_gelu(x),
    ),
    "swiglu gates the second half": (
        "swiglu-float32-2x5x48-test",
        "npu_swiglu",
        lambda x, dim: _npu.npu_swiglu(torch.cat(x.chunk(2, -1)[::-1], -1), dim),
    ),
    "rotary half for interleave": (
        "rope-float32-2x5x3x16-interleaved-test",
        "npu_rotary_mul",
        lambda x, cos, sin, mode: _npu.npu_rotary_mul(x, cos, sin, "half"),
    ),
    "rotary interleave for half": (
        "rope-float32-2x5x3x16-test",
        "npu_rotary_mul",
        lambda x, cos, sin, mode: _npu.npu_rotary_mul(x, cos, sin, "interleave"),
    ),
    "rotary sine before cosine": (
        "rope-float32-2x5x3x16-grad",
        "npu_rotary_mul",
        lambda x, cos, sin, mode: _npu.npu_rotary_mul(x, sin, cos, mode),
    ),
    "mask shows where it should hide": (
        "attention-float32-2x9x3x16-causal-test",
        "npu_fusion_attention",
        lambda *a, atten_mask, **k: _npu.npu_fusion_attention(*a, atten_mask=~atten_mask, **k),
    ),
    "no mask": (
        "attention-float32-2x9x3x16-prefix-grad",
        "npu_fusion_attention",
        lambda *a, atten_mask, **k: _npu.npu_fusion_attention(*a, **k),
    ),
    "scale left at its default": (
        "attention-float32-2x9x3x16-prefix-test",
        "npu_fusion_attention",
        lambda *a, scale, **k: _npu.npu_fusion_attention(*a, **k),
    ),
    "heads before sequence": (
        "attention-float32-2x9x3x16-prefix-test",
        "npu_fusion_attention",
        lambda q, k, v, n, layout, **rest: _npu.npu_fusion_attention(q, k, v, n, "BNSD", **rest),
    ),
    "norm's eps left at its default": (
        "rms_norm-float32-4x96-tiny-test",
        "npu_rms_norm",
        lambda x, gamma, eps: _npu.npu_rms_norm(x, gamma),
    ),
    "fused norm's eps left at its default": (
        "add_rms_norm-float32-4x96-eps-test",
        "npu_add_rms_norm",
        lambda x, y, gamma, eps: _npu.npu_add_rms_norm(x, y, gamma),
    ),
    "norm gradient in aclnn's argument order": (
        "add_rms_norm-float32-2x5x96-grad",
        "npu_rms_norm_backward",
        lambda dy, x, gamma, rstd: _npu.npu_rms_norm_backward(dy, x, rstd, gamma),
    ),
    "the sum is not asked for": (
        "add_layer_norm-float32-2x5x96-test",
        "npu_add_layer_norm",
        lambda *a: _npu.npu_add_layer_norm(*a[:5], False),
    ),
    "losses in the logits' dtype": (
        "linear_cross_entropy-bfloat16-10x96-50-test",
        "npu_cross_entropy_loss",
        lambda z, *a: _npu.npu_cross_entropy_loss(z.bfloat16(), *a),
    ),
    "scales of one group for all": (
        "quantized_linear-float16-3x256-17-int8-group128-strided-test",
        "npu_weight_quant_batchmatmul",
        lambda x, w, scale, *a: _npu.npu_weight_quant_batchmatmul(x, w, scale[:1], *a[:4]),
    ),
    "two codes of a byte swapped": (
        "quantized_linear-float16-2x5x96-64-int4-test",
        "npu_convert_weight_to_int4pack",
        lambda w: _npu.npu_convert_weight_to_int4pack(
            w.unflatten(0, (-1, 2)).flip(1).flatten(0, 1).contiguous()
        ),
    ),
    "mean of the losses": (
        "linear_cross_entropy-float32-10x96-50-test",
        "npu_cross_entropy_loss",
        lambda z, *a: _npu.npu_cross_entropy_loss(z, *a[:2], "mean"),
    ),
}


class Mistaken:
    """Replaces torch.ops.npu by one that calls an operator wrongly."""

    def __init__(self, operator: str, wrong: Wrong) -> None:
        setattr(self, operator, wrong)

    def __getattr__(self, operator: str) -> Any:
        return getattr(_npu, operator)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_a_call_is_rejected(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    id, operator, wrong = MISTAKES[mistake]
    [case] = select(BACKEND, id=id)
    assert outcome(case) == ("pass", "")
    for module in (ascend, ascend.autograd, ascend.loss):
        monkeypatch.setattr(module, "_npu", Mistaken(operator, wrong))
    result, reason = outcome(case)
    assert result == "fail", reason


@pytest.mark.parametrize("power", [0, 1], ids=["beta^t", "beta^(t-1)"])
def test_the_fused_adamw_is_rejected(power: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows why `adamw` does not call it: called correctly, v still has the error of 1 - beta2 in
    float32."""

    def fused(
        p: Any,
        g: Any,
        m: Any,
        v: Any,
        step: int,
        lr: float,
        b1: float,
        b2: float,
        eps: float,
        decay: float,
    ) -> None:
        for param, grad, first, second in zip(p, g, m, v, strict=True):
            _npu.npu_apply_adam_w.out(
                b1 ** (step - power),
                b2 ** (step - power),
                lr,
                decay,
                b1,
                b2,
                eps,
                grad,
                None,
                False,
                False,
                out=[param, first, second],
            )

    case = CASES["adamw-float32-mixed-test"]
    assert outcome(case) == ("pass", "")
    monkeypatch.setattr(ascend, "_adamw", fused)
    result, reason = outcome(case)
    assert result == "fail"
    assert ("exp_avg_sqs" in reason) == bool(power)


def case(op: str, dtype: str = "float32") -> Case:
    """Returns the op's first case."""
    return next(c for c in CASES.values() if c.id.startswith(f"{op}-{dtype}-"))


def support(of: Case, **changes: Any) -> str:
    """Returns the reason why the backend refuses the case's arguments, of which some are
    replaced."""
    args = {**of.sample.make(of.dtype), **changes}
    return BACKEND.support(of.op, args).reason


def test_four_bit_weights_are_packed_once_until_they_change() -> None:
    codes = torch.randint(-128, 128, (16, 32), dtype=torch.int8)
    first = ascend.autograd.operand(codes, 4)
    assert ascend.autograd.operand(codes, 4) is first
    codes.zero_()
    changed = ascend.autograd.operand(codes, 4)
    assert not changed.any()
    assert first.any()


FUSED = (
    "rms_norm",
    "add_rms_norm",
    "add_layer_norm",
    "geglu",
    "swiglu",
    "rope",
    "attention",
    "linear_cross_entropy",
)


@pytest.mark.parametrize("op", FUSED)
def test_first_generation_lacks_the_fused_operators(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("Ascend910A", "Ascend910B", "Ascend910ProB"):
        monkeypatch.setattr(chip, "name", lambda name=name: name)
        assert f"needs Atlas A2 (Ascend910B1) or later, not {name}" in support(case(op))
    for name in ("Ascend910B1", "Ascend910B4-1", "Ascend910_9391"):
        monkeypatch.setattr(chip, "name", lambda name=name: name)
        assert support(case(op)) == ""


def test_first_generation_has_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chip, "name", lambda: "Ascend910A")
    assert support(case("linear")) == "" == support(case("linear", "float16"))
    assert "Ascend910A has no bfloat16; train in float16" in support(case("linear", "bfloat16"))


def test_limits_are_told() -> None:
    wide = torch.zeros(1, 2, 1, 769)
    reason = support(case("attention"), q=wide, k=wide, v=wide)
    assert "up to 256 heads of 768 dimensions, received 1 of 769" in reason
    table = torch.zeros(1, 5, 1, 448)
    assert "received 896 and 3" in support(case("rope"), cos=table, sin=table)
    assert "float64" in support(case("gelu"), x=torch.zeros(2, dtype=torch.float64))
    mixed = {"x": torch.zeros(2, 96, dtype=torch.float16)}
    assert "one dtype" in support(case("rms_norm"), **mixed)
    assert "no empty tensor" in support(case("swiglu"), x=torch.zeros(0, 8))


@pytest.mark.parametrize("name", ["tiny", "glm4-34m", "glm-base", "chatglm-6b", "glm-4-0414-9b"])
def test_a_small_glm_trains_as_on_the_reference(name: str) -> None:
    """Two optimizer steps of every architecture give the reference's losses and weights."""
    sizes = {"num_layers": 2, "hidden": 64, "num_heads": 4, "head_dim": 16, "ffn": 96, "vocab": 128}
    config = preset(name, **sizes, num_kv_heads=2, max_length=32)
    runs = [trained(config, backend) for backend in (BACKEND, "reference")]
    (losses, weights), (want_losses, want_weights) = runs
    torch.testing.assert_close(losses, want_losses, rtol=2e-6, atol=0)
    for n, weight in weights.items():
        moved = (want_weights[n] - weight).norm() / want_weights[n].norm().clamp(min=1e-3)
        assert moved < 1e-3, n  # Adam divides gradients near zero by their own size


def trained(config: ModelConfig, backend: Backend | str) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns losses and weights of training on packed samples, a prefix and token weights."""
    model = GLM(config).init_weights(0)
    optimizer = Optimizer(model, TrainConfig(lr=1e-3))
    g = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(0, 128, (2, 16), generator=g) for _ in range(2))
    rows = torch.arange(16)
    batch = {
        "tokens": tokens,
        "positions": rows.expand(2, 2, 16).contiguous(),
        "key_start": (rows // 8 * 8).expand(2, 16).int(),
        "key_end": (rows + 1).clamp(min=4).expand(2, 16).int(),
        "labels": labels,
        "token_weight": torch.rand(2, 16, generator=g) / 16,
    }
    losses = []
    with registry.use(backend, strict=True) as session:
        for _ in range(2):
            model.zero_grad()
            loss = model.loss(**batch)
            loss.backward()
            optimizer.step(1e-3)
            losses.append(loss.detach())
    assert not session.fallbacks
    return torch.stack(losses), {n: p.detach() for n, p in model.named_parameters()}


def test_every_op_has_a_kernel() -> None:
    assert set(BACKEND.kernels) == set(ops.all_ops())


def test_peaks_carry_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = BACKEND.peak(torch.bfloat16)
    assert peak is not None
    assert peak.tflops == 294.9
    assert "msmodeling" in peak.source
    monkeypatch.setattr(chip, "name", lambda: "Ascend910A")
    assert BACKEND.peak(torch.bfloat16) is None
    monkeypatch.setattr(chip, "name", lambda: "Ascend910B1")
    assert BACKEND.peak(torch.float16) is None
