"""Honest kernels whose errors lean to one side are not called wrong; what leans further is."""

import math

import torch
from torch import Tensor

from glm_core.verdict import honest_kernels
from glm_core.verdict.judge import judge
from glm_core.verdict.oracle import Call, compute

aten = torch.ops.aten
Z = 6.0


def similar_rows() -> Tensor:
    """Returns rows of one pattern and a little noise, whose means are small beside their
    elements: the same roundings happen in all of them."""
    generator = torch.Generator().manual_seed(4)
    pattern = torch.randn(64, generator=generator)
    pattern -= pattern.mean() - 1e-3
    return pattern + 0.03 * torch.randn(512, 64, generator=generator)


def mean_in_lanes(x: Tensor, lanes: int) -> Tensor:
    """Returns the rows' means by running updates in lanes (Welford 1962), as torch's layer norm has
    them: the share of number n is a rounded 1 / n."""
    mean = torch.zeros_like(x[:, :lanes])
    for k, part in enumerate(x.split(lanes, 1)):
        mean = mean + (part - mean) * (1 / (k + 1))
    total = mean[:, 0]
    for k in range(1, lanes):
        total = total + (mean[:, k] - total) * (1 / (k + 1))
    return total.unsqueeze(-1)


def test_layer_norm_by_running_updates_is_honest_and_a_leaning_mean_is_not() -> None:
    x = similar_rows()
    call = Call(aten.native_layer_norm.default, (x, [64], None, None, 1e-5), {}, "cpu")
    y, mean, scale = call.func(*call.args)
    for lanes in (4, 8, 16):
        mean = mean_in_lanes(x, lanes)
        honest = judge(call, {"y0": y, "y1": mean, "y2": scale}, Z)
        assert not honest.outside, honest.outside
    rms = float(mean.square().mean().sqrt())
    wrong = judge(call, {"y0": y, "y1": mean + 1e-4 * rms, "y2": scale}, Z)
    assert "offset" in {o.test for o in wrong.outside}


def test_gelu_by_another_erf_is_honest_where_its_slope_is_small() -> None:
    generator = torch.Generator().manual_seed(4)
    x = -0.65 + 0.02 * torch.randn(256, 8, generator=generator)
    grad = torch.randn(256, 8, generator=generator)
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    erf = honest_kernels.polynomial_erf(x / math.sqrt(2))
    assert (erf.double() - torch.erf(x.double() / math.sqrt(2))).abs().max() < 5e-7
    call = Call(aten.gelu_backward.default, (grad, x), {}, "cpu")
    slope = 0.5 * (1 + erf) + x * density
    assert not judge(call, {"y": grad * slope}, Z).outside
    assert judge(call, {"y": grad * (slope + 1e-4)}, Z).outside


def test_attention_that_rounds_its_exponentials_is_honest() -> None:
    """Logits are alike, so that all exponentials lie just below 1 and many are rounded to one
    side."""
    generator = torch.Generator().manual_seed(4)
    q, k, v = ((0.03 * torch.randn(2, 2, 32, 16, generator=generator)).bfloat16() for _ in range(3))
    v += 0.03
    call = Call(
        aten._scaled_dot_product_flash_attention_for_cpu.default, (q, k, v), {"scale": 0.25}, "cpu"
    )
    logits = 8 * q.float() @ k.float().transpose(-2, -1)
    call.kwargs["scale"] = 8.0
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    y = weights.bfloat16().float() @ v.float() / weights.sum(-1, keepdim=True)
    results = {"y0": y.bfloat16()}
    exact = compute(call, torch.float64)["y0"]
    lean = float(((results["y0"].double() - exact) * exact).sum() / exact.square().sum())
    assert abs(lean) > 1e-5
    assert not judge(call, results, Z).outside
    assert judge(call, {"y0": (1.01 * y).bfloat16()}, Z).outside
