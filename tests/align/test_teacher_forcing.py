"""Capture, replay, disguises, and which kernels they convict."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import markov
import numpy as np
import pytest
import torch
from torch import Tensor

from glm_core import align, ops
from glm_core.align import honest_ways, statistics, teacher_forcing
from glm_core.align.capture import Call, capture, copied
from glm_core.align.disguise import Exact, Regrouped, Rounded
from glm_core.align.replay import exact, replay
from glm_core.align.teacher_forcing import measure
from glm_core.align.training import Run
from glm_core.align.verdict import Pair
from glm_core.align.worst_tests import fair_tests, outside_first, worst_tests
from glm_core.backends import registry
from glm_core.config import Dtype

F = torch.nn.functional
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
Kernel = Callable[..., Any]


def first(name: str, dtype: Dtype) -> Call:
    return next(c.call for c in markov.calibration(dtype).cases if c.call.op.name == name)


def test_a_step_is_captured_whole_and_layers_are_named() -> None:
    run = Run(markov.config("float32"), markov.Markov(), "reference")
    with registry.use("reference"), capture(run.model, 1) as seen:
        run.step()
    names = [call.op.name for call in seen.calls]
    per_layer = {"linear": 4, "attention": 1, "rope": 1, "geglu": 1}
    for op, count in per_layer.items():
        layers = [c.layer for c in seen.calls if c.op.name == op]
        assert layers == [layer for layer in "01" for _ in range(count)]
    assert names[0] == "embedding"
    assert names[-3:] == ["global_norm", "adamw", "adamw"]
    differentiable = [c for c in seen.calls if c.op.differentiable]
    assert all(
        g is not None
        for c in differentiable
        for g in c.output_gradients
        if c.op.name != "add_layer_norm"
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_replayed_step_gives_the_steps_own_gradients(dtype: Dtype) -> None:
    run = Run(markov.config(dtype), markov.Markov(), "reference")
    with registry.use("reference"), capture(run.model, 1) as seen:
        run.backward(run.batches())
    last = [c for c in seen.calls if c.op.name == "linear"][-1]
    results = replay(last, last.op)
    gradient = run.model.get_parameter("blocks.1.mlp.down.weight").grad
    assert gradient is not None
    assert torch.equal(results["d_weight"], gradient)


def test_arguments_keep_their_strides() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)[:, :, 1:3]
    y = copied(x)
    assert torch.equal(x, y)
    assert x.stride() == y.stride()
    call = first("attention", "float32")
    assert not call.args["v"].is_contiguous()


def test_updates_replay_on_copies() -> None:
    call = first("adamw", "float32")
    before = [p.clone() for p in call.args["params"]]
    once, twice = replay(call, call.op), replay(call, call.op)
    assert torch.equal(once["params"], twice["params"])
    assert all(map(torch.equal, before, call.args["params"]))
    assert once["change"].abs().max() > 0


def test_one_weight_may_be_rounded_the_other_way_in_a_small_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a warm-up's first steps a unit of a weight above 1 is much of the change. Whether any
    disguise meets that weight is chance, so none is used here."""
    monkeypatch.setattr(teacher_forcing, "disguises", lambda dtype: {})
    call = first("adamw", "float32")
    params = [p.clone() for p in call.args["params"]]
    params[0].view(-1)[0] = 1.5
    small = dataclasses.replace(call, args=call.args | {"params": params, "lr": 1e-5})
    [case] = teacher_forcing.cases([small])
    limits = teacher_forcing.benign_limits([case], torch.float32)
    key = teacher_forcing.Key("adamw", "change", "all", "peak", pooled=False)
    unit = 2.0**-23 / float(replay(small, small.op.reference)["change"].abs().max())
    allowed = teacher_forcing.limit(limits, key, torch.float32, 1)
    assert 1e-3 < unit < allowed < 3 * unit  # honest kernels round once more


def test_a_norms_longest_sum_is_over_all_tensors() -> None:
    """A kernel may add up one square after another in float32: the contract asks no more."""
    call = first("global_norm", "float32")
    [case] = teacher_forcing.cases([call])
    assert case.terms == sum(t.numel() for t in call.args["tensors"])
    [update] = teacher_forcing.cases([first("adamw", "float32")])
    assert update.terms < case.terms  # every element by itself


def test_a_sign_test_that_can_convict_nobody_has_no_ratio() -> None:
    key = teacher_forcing.Key("rms_norm", "y", "row", "sign", pooled=False)

    def ratio(range_of_signs: float) -> float:
        limit = teacher_forcing.limit({key: range_of_signs}, key, torch.bfloat16, 1)
        return float(statistics.excess(np.array([1.0]), np.array([0.01]), limit, z=1.0)[0])

    assert ratio(0.45) == pytest.approx(0.96 / 0.9)
    assert ratio(0.5) < 1e-20


def test_a_call_without_a_further_intermediate_is_not_run_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call, runs = first("linear", "bfloat16"), list[Call]()
    replayed = honest_ways.replay
    monkeypatch.setattr(
        honest_ways, "replay", lambda c, *rest: [runs.append(c), replayed(c, *rest)][1]
    )
    runners = honest_ways.disguises(torch.bfloat16)
    each = [f"rounded {which}" for which in range(honest_ways.MAX_ROUNDED)]
    changed_something = [runners[name](call) is not None for name in each]
    intermediates = sum(changed_something)
    assert 0 < intermediates < len(each) - 1
    assert changed_something == sorted(changed_something, reverse=True)
    assert len(runs) == intermediates + 1


def test_exact_keeps_the_contracts_roundings_and_no_others() -> None:
    x, weight, bias = (torch.randn(s).bfloat16() for s in ((64, 32), (32,), (32,)))
    residual = torch.randn(64, 32).bfloat16()
    with Exact():
        y, total = ops.add_layer_norm.reference(x, residual, weight, bias)
    assert torch.equal(total, (x.double() + residual.double()).bfloat16())
    right = ops.layer_norm.reference(total.double(), weight.double(), bias.double()).bfloat16()
    assert torch.equal(y, right)


@pytest.mark.parametrize(
    ("error", "convicted"), [(0.0, False), (1e-3, True)], ids=["honest", "off by 1e-3"]
)
def test_a_loss_of_few_tokens_may_keep_its_logits_in_float32(error: float, convicted: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    x, weight = (torch.randn(s, generator=generator).bfloat16() for s in ((12, 16), (40, 16)))
    args = {"x": x, "weight": weight, "labels": torch.arange(12), "token_weight": torch.ones(12)}
    call = Call(
        op=ops.linear_cross_entropy,
        index=0,
        layer="",
        step=1,
        args=args,
        output_gradients=[torch.ones(())],
    )

    def kept_wide(call: Call) -> dict[str, Tensor]:
        low = ("d_x", "d_weight")
        wide = dict(args, x=x.float(), weight=weight.float())
        y = replay(dataclasses.replace(call, args=wide), call.op.reference)
        return {
            n: (t * (1 + error)).to(torch.bfloat16 if n in low else t.dtype) for n, t in y.items()
        }

    [case] = teacher_forcing.cases([call])
    limits = teacher_forcing.benign_limits([case], torch.bfloat16)
    _, values = worst_tests(measure([case], kept_wide)[0], [case], limits)
    ratios = [abs(effect) / limit for effect, se, limit in values if se == 0]
    assert (max(ratios) > 1) == convicted
    assert convicted or max(ratios) < 0.1
    rounded_logits = case.correct["y"].errors(kept_wide(call)["y"].numpy().reshape(-1))
    assert abs(rounded_logits[0]) > 1e-5 * case.correct["y"].peak  # the two kinds do differ


def test_the_gradient_of_a_sum_that_is_passed_on_is_rounded_once() -> None:
    shapes = {"x": (64, 32), "residual": (64, 32), "weight": (32,), "bias": (32,)}
    args = {n: torch.randn(shape).bfloat16() for n, shape in shapes.items()}
    given = [torch.randn(64, 32).bfloat16() for _ in range(2)]
    call = Call(
        op=ops.add_layer_norm, index=0, layer="", step=1, args=args, output_gradients=[*given]
    )
    plain = replay(call, call.op.reference)
    total = plain["y1"].double().requires_grad_()
    y = ops.layer_norm.reference(total, args["weight"].double(), args["bias"].double())
    (right,) = torch.autograd.grad((y, total), (total,), [g.double() for g in given])
    found = exact(call, plain)
    assert torch.equal(found["y0"], y.bfloat16())
    assert torch.equal(found["d_x"], right.bfloat16())
    assert not torch.equal(plain["d_x"], right.bfloat16())  # autograd rounds it on the way


def test_regrouped_changes_last_bits_only() -> None:
    x, w = torch.randn(64, 300), torch.randn(50, 300)
    with Regrouped(0):
        y = F.linear(x, w)
    plain = F.linear(x, w)
    assert not torch.equal(y, plain)
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-4)


def test_rounded_rounds_the_one_intermediate_it_is_told_to() -> None:
    x = torch.randn(8, 64).bfloat16()

    def run(which: int | None) -> tuple[Tensor, int]:
        mode = Rounded(torch.bfloat16, 8 * 32, which)
        with mode:
            return ops.geglu.reference(x), mode.seen

    a, b = x.float().chunk(2, -1)
    assert run(0)[1] == 2  # gelu(b), and the product before its own rounding
    assert torch.equal(run(0)[0], (a * F.gelu(b).bfloat16().float()).bfloat16())
    assert torch.equal(run(7)[0], ops.geglu.reference(x))


def verdict(dtype: Dtype, **kernels: Kernel) -> Pair:
    """Judges these kernels' own calls and whole steps; the other ops are references."""
    cal = markov.calibration(dtype)
    own = [c for c in cal.cases if c.call.op.name in kernels]
    cal, backend = dataclasses.replace(cal, cases=own), markov.backend(**kernels)
    trace = align.record(markov.config(dtype), backend, calibration=cal, free_run=False)
    return align.compare(cal.reference, trace)


def norm(change: Callable[[Tensor], Tensor]) -> Kernel:
    def add_layer_norm(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, alpha: float
    ) -> tuple[Tensor, Tensor]:
        total = (x.float() + alpha * residual.float()).to(x.dtype)
        t = total.float() - total.float().mean(-1, keepdim=True)
        y = change(t * torch.rsqrt(t.square().mean(-1, keepdim=True) + eps))
        return (y * weight.to(y.dtype) + bias.to(y.dtype)).to(x.dtype), total

    return add_layer_norm


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    scale: float,
    layer_scale: float,
    pb_relax: float,
) -> Tensor:
    """Rounds the probabilities before they are normalised, as flash attention does."""
    j = torch.arange(k.shape[1])
    hidden = ~((j >= key_start[..., None]) & (j < key_end[..., None]))[:, None]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    s = (q.float() @ k.float().mT * scale).masked_fill(hidden, -1e30)
    e = torch.exp(s - s.amax(-1, keepdim=True).detach())
    y = (e.to(q.dtype).float() @ v.float()) / e.sum(-1, keepdim=True)
    return y.to(q.dtype).transpose(1, 2)


def split_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    n = x.shape[-1] // 3
    parts = zip(x.float().split(n, -1), weight.float().split(n, -1), strict=True)
    y = sum(a @ b.mT for a, b in parts)
    return (y if bias is None else y + bias.float()).to(x.dtype)


HONEST: dict[str, dict[str, Kernel]] = {
    "flash attention": {"attention": flash},
    "norm rounded before the affine part": {"add_layer_norm": norm(lambda y: y)},
    "split sums": {"linear": split_linear},
    "geglu in the working dtype": {
        "geglu": lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1])
    },
    "cross-entropy in chunks": {
        "linear_cross_entropy": lambda x, weight, labels, token_weight: sum(
            ops.linear_cross_entropy.reference(a, weight, b, c)
            for a, b, c in zip(x.split(37), labels.split(37), token_weight.split(37), strict=True)
        )
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HONEST)
def test_honest_kernels_are_not_convicted(name: str, dtype: Dtype) -> None:
    pair = verdict(dtype, **HONEST[name])
    assert pair.verdict == "aligned", pair.reasons
    assert pair.max_op_ratio < 0.9


def changed(op: Any, **arguments: Any) -> Kernel:
    """Calls the reference with other arguments; a change that is a function is applied to the
    argument that was passed."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        named = op.named(args, kwargs)
        for key, value in arguments.items():
            named[key] = value(named[key]) if callable(value) else value
        return op.reference(**named)

    return kernel


class Reused:
    """Returns one and the same buffer for all results of a shape."""

    def __init__(self) -> None:
        self.buffers: dict[torch.Size, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        y = ops.geglu.reference(x)
        buffer = self.buffers.setdefault(y.shape, torch.empty_like(y.detach()))
        return Swap.apply(y, buffer)  # type: ignore[no-untyped-call]  # torch leaves apply untyped


class Swap(torch.autograd.Function):
    """Returns y in the buffer's memory; its backward is that of y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, buffer: Tensor) -> Tensor:
        buffer.copy_(y)
        return torch.empty_like(y).set_(buffer.untyped_storage(), 0, y.shape, y.stride())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Forgetful:
    """Makes every third call return the result of the call before."""

    def __init__(self) -> None:
        self.calls, self.last = 0, torch.zeros(())

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = ops.geglu.reference(x)
        if self.calls % 3 == 0 and self.last.shape == y.shape:
            y = y * 0 + self.last
        self.last = y.detach()
        return y


class DropsARow(torch.autograd.Function):
    """A linear layer whose backward leaves the first token out of the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (x, weight), (g,) = ctx.saved_tensors, gradients
        rows = g.flatten(0, -2)
        return g @ weight, rows[1:].mT @ x.flatten(0, -2)[1:], rows.sum(0)


def row_dropped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return DropsARow.apply(x, weight, bias)  # type: ignore[no-untyped-call]  # as above


BUGS: dict[str, tuple[str, str, Callable[[], dict[str, Kernel]]]] = {
    "eps 1e-6": (
        "layer_norm",
        "forward",
        lambda: {"layer_norm": changed(ops.layer_norm, eps=1e-6)},
    ),
    "alpha 0.3 % too large": (
        "add_layer_norm",
        "forward",
        lambda: {"add_layer_norm": changed(ops.add_layer_norm, alpha=lambda a: 1.003 * a)},
    ),
    "attention scale 0.3 % too large": (
        "attention",
        "backward",
        lambda: {"attention": changed(ops.attention, scale=lambda s: 1.003 * s)},
    ),
    "one key leaks": (
        "attention",
        "forward",
        lambda: {"attention": changed(ops.attention, key_end=leaks)},
    ),
    "gradient shrink 0.11": (
        "embedding",
        "backward",
        lambda: {"embedding": changed(ops.embedding, shrink=0.11)},
    ),
    "Adam eps 1e-6": ("adamw", "forward", lambda: {"adamw": changed(ops.adamw, eps=1e-6)}),
    "Adam beta2 0.951": ("adamw", "forward", lambda: {"adamw": changed(ops.adamw, beta2=0.951)}),
    "weight decay 0.11": (
        "adamw",
        "forward",
        lambda: {"adamw": changed(ops.adamw, weight_decay=lambda w: 1.1 * w)},
    ),
    "row dropped": ("linear", "backward", lambda: {"linear": row_dropped}),
    "buffer reused": ("geglu", "forward", lambda: {"geglu": Reused()}),
    "stale result": ("geglu", "forward", lambda: {"geglu": Forgetful()}),
}


def leaks(key_end: Tensor) -> Tensor:
    """Query 9 of every sequence sees one key more."""
    place = torch.arange(key_end.shape[1]) == 9
    return (key_end + place).int().clamp(max=key_end.shape[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BUGS)
def test_bugs_are_convicted_by_name(name: str, dtype: Dtype) -> None:
    op, direction, kernels = BUGS[name]
    pair = verdict(dtype, **kernels())
    assert pair.verdict == "diverged"
    assert {f.op for f in pair.findings} == {op}
    assert direction in {f.direction for f in pair.findings}


def shapes(case: teacher_forcing.Case) -> tuple[torch.Size, ...]:
    return tuple(t.shape for t in case.call.args.values() if isinstance(t, Tensor))


@pytest.mark.parametrize("pooled", [False, True])
def test_what_a_sample_did_not_show_is_measured_on_the_calls_themselves(pooled: bool) -> None:
    """A norm rounds before its affine part, and the sampled calls showed nothing of it: in a single
    call, or in the signs of all."""
    kernel = norm(lambda y: y.bfloat16())
    cal = markov.calibration("bfloat16")
    unseen = {
        k
        for k in cal.limits
        if k.op == "add_layer_norm"
        and k.pooled == pooled
        and (not pooled or k.statistic in statistics.SHARES)
    }
    blind = {k: 0.0 if k in unseen else v for k, v in cal.limits.items()}
    own = [c for c in cal.cases if c.call.op is ops.add_layer_norm]
    measured, _ = measure(own, lambda call: replay(call, kernel))
    assert outside_first(*worst_tests(measured, own, blind))
    assert not outside_first(*fair_tests(measured, own, blind))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_benign_range_comes_from_each_shape(dtype: Dtype) -> None:
    cases = markov.calibration(dtype).cases
    chosen = teacher_forcing.sample(cases)
    assert {shapes(case) for case in chosen} == {shapes(case) for case in cases}
    assert len(chosen) < len(cases)


def test_results_of_the_wrong_shape_or_not_finite_are_guilty() -> None:
    nan = verdict("float32", rope=lambda x, cos, sin, interleaved=False: x * float("nan"))
    assert nan.findings[0].op == "rope"
    assert nan.to_json()["findings"][0]["ratio"] > 1
