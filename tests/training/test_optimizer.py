"""Learning rate, loss scale, clipping and AdamW, each against an independent source."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glm_core.config import TrainConfig
from glm_core.training.loss_scale import LossScale
from glm_core.training.optimizer import Optimizer, learning_rate


def train_config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"backend": "reference", "warmup_steps": 0, **changes})


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(5, 3, generator=g))
        self.vector = nn.Parameter(torch.randn(7, generator=g))
        self.other = nn.Parameter(torch.randn(2, 2, generator=g))


def set_grads(model: nn.Module, step: int, scale: float = 1.0) -> None:
    g = torch.Generator().manual_seed(100 + step)
    for p in model.parameters():
        p.grad = (torch.randn(p.shape, generator=g) * scale).to(p.dtype)


# --- learning rate -------------------------------------------------------------------------------


def test_learning_rate_is_glms_with_the_cosine_ending_at_the_last_step() -> None:
    """GLM's learning_rates.py, written out: it divides by end_iter, which we choose to be the
    number of steps after the warmup, so that the minimum is reached at the last step."""
    c = train_config(lr=8e-5, min_lr=8e-6, warmup_steps=7, steps=50)

    def glm(it: int, start_lr: float, warmup: int, end: int, decay_ratio: float) -> float:
        if warmup > 0 and it <= warmup:
            return start_lr * it / warmup
        s, r = min(1.0, (it - warmup) / end), 1 / decay_ratio
        return start_lr / r * ((math.cos(math.pi * s) + 1) * (r - 1) / 2 + 1)

    for step in range(1, 60):
        assert learning_rate(c, step) == pytest.approx(glm(step, 8e-5, 7, 43, 0.1), rel=1e-12)
    assert learning_rate(c, 7) == 8e-5
    assert learning_rate(c, 50) == pytest.approx(8e-6, rel=1e-12)
    # GLM's own choice, end_iter = all steps, would stop above the minimum
    assert glm(50, 8e-5, 7, 50, 0.1) > 1.3 * 8e-6


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [(0, 4, [0.868198, 0.55, 0.231802, 0.1]), (2, 2, [0.5, 1.0, 0.1]), (8, 4, [0.125, 0.25])],
)
def test_learning_rate_at_the_edges(warmup: int, steps: int, expected: list[float]) -> None:
    c = train_config(lr=1.0, min_lr=0.1, warmup_steps=warmup, steps=steps)
    assert [learning_rate(c, i + 1) for i in range(len(expected))] == pytest.approx(
        expected, abs=1e-6
    )


# --- loss scale ----------------------------------------------------------------------------------

# overflow?, scale, good steps and overflows counted afterwards; window 3, hysteresis 2, start 8
TABLE = [
    (False, 8, 1, 0),
    (True, 8, 0, 1),  # the first overflow is forgiven: hysteresis
    (False, 8, 1, 1),
    (True, 4, 0, 2),  # good steps in between do not restore the hysteresis
    (True, 2, 0, 3),
    (False, 2, 1, 3),
    (False, 2, 2, 3),
    (False, 4, 3, 0),  # a full window: doubled, hysteresis restored
    (True, 4, 0, 1),
    (False, 4, 1, 1),
    (False, 4, 2, 1),
    (False, 8, 3, 0),
    (False, 8, 4, 0),
    (False, 8, 5, 0),
    (False, 16, 6, 0),  # the next window
    (True, 16, 0, 1),
    (True, 8, 0, 2),
    (True, 4, 0, 3),
    (True, 2, 0, 4),
    (True, 1, 0, 5),
    (True, 1, 0, 6),  # the minimum
]


def test_loss_scale_follows_the_table() -> None:
    state = LossScale(scale=8.0, window=3, hysteresis=2)
    for row, (overflow, *expected) in enumerate(TABLE):
        state.update(overflow)
        assert [state.scale, state.good_steps, state.overflows] == expected, f"row {row}"


# --- clipping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e3])
@pytest.mark.parametrize("loss_scale", [1.0, 4096.0])
def test_clipping_is_torchs(clip: float, loss_scale: float) -> None:
    """A first AdamW step with eps = 1 moves a weight by lr g / (|g| + 1): g can be read off."""
    mine, theirs = Small(), Small()
    set_grads(mine, 0, loss_scale)
    set_grads(theirs, 0)
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), clip or math.inf)
    before = copy.deepcopy(mine)
    optimizer = Optimizer(mine, train_config(clip=clip, weight_decay=0.0, eps=1.0))
    assert float(optimizer.step(0.1, loss_scale)) == pytest.approx(float(norm), rel=4 * EPS)
    for p, q, old in zip(mine.parameters(), theirs.parameters(), before.parameters(), strict=True):
        assert q.grad is not None
        moved = ((old - p) / 0.1).double()
        read = moved / (1 - moved.abs())
        # the subtraction loses old's rounding, eps |old| / lr, magnified by 1 / (1 - |moved|)^2
        error = 2 * EPS * (1 + old.abs().double() / 0.1) / (1 - moved.abs()) ** 2
        assert ((read - q.grad.double()).abs() <= error).all()


EPS = torch.finfo(torch.float32).eps


# --- AdamW ---------------------------------------------------------------------------------------


def torchs(model: nn.Module, c: TrainConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=c.weight_decay
    )


def distance(model: nn.Module, truth: nn.Module) -> float:
    pairs = zip(model.parameters(), truth.parameters(), strict=True)
    return math.sqrt(
        sum(float((p.detach().double() - q.detach()).square().sum()) for p, q in pairs)
    )


def trained(steps: int, c: TrainConfig) -> tuple[float, float]:
    """Distances of our and torch's float32 AdamW from torch's in float64."""
    truth, theirs, mine = Small().double(), Small(), Small()
    peers = [torchs(truth, c), torchs(theirs, c)]
    optimizer = Optimizer(mine, c)
    for step in range(steps):
        for model in (truth, theirs, mine):
            set_grads(model, step)
            assert model.other.grad is not None
            model.other.grad *= 1e-6  # comparable with eps
        for peer in peers:
            peer.step()
        optimizer.step(c.lr)
    return distance(mine, truth), distance(theirs, truth)


def test_adamw_is_torchs() -> None:
    ours, peers = trained(20, train_config(lr=1e-2, clip=0.0, eps=1e-6))
    assert 0 < ours <= 2 * peers


@pytest.mark.parametrize("wrong", ["beta2", "eps", "weight_decay"])
def test_the_comparison_with_torch_can_fail(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    c = train_config(lr=1e-2, clip=0.0, eps=1e-6)
    init = Optimizer.__init__

    def off_by_a_thousandth(self: Optimizer, model: nn.Module, config: TrainConfig) -> None:
        init(self, model, config)
        changed = copy.copy(config)
        object.__setattr__(changed, wrong, getattr(config, wrong) * 1.001)
        self.config = changed

    monkeypatch.setattr(Optimizer, "__init__", off_by_a_thousandth)
    ours, peers = trained(20, c)
    assert ours > 2 * peers


# --- precision and state -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_masters_keep_what_rounding_would_lose(dtype: str) -> None:
    model = Small().to(getattr(torch, dtype))
    optimizer = Optimizer(model, train_config(dtype=dtype, weight_decay=0.0, clip=0.0))
    start = {n: p.clone() for n, p in optimizer.master.items()}
    for _ in range(64):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(1e-5)
        for name, p in model.named_parameters():
            assert torch.equal(p, optimizer.master[name].to(p.dtype))
    for name, p in optimizer.master.items():
        assert p.dtype == torch.float32
        assert (start[name] - p).mean() == pytest.approx(64e-5, rel=1e-2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_leaves_everything(bad: float) -> None:
    model = Small()
    optimizer = Optimizer(model, train_config())
    set_grads(model, 0)
    optimizer.step(1e-2)
    before = {k: v.clone() for k, v in optimizer.state()["tensors"].items()}
    set_grads(model, 1)
    assert model.vector.grad is not None
    model.vector.grad[3] = bad
    assert not math.isfinite(float(optimizer.step(1e-2)))
    assert optimizer.step_count == 1
    assert all(torch.equal(v, before[k]) for k, v in optimizer.state()["tensors"].items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_goes_on_bit_for_bit(dtype: str) -> None:
    def start() -> tuple[nn.Module, Optimizer]:
        model = Small().to(getattr(torch, dtype))
        return model, Optimizer(model, train_config(dtype=dtype))

    def go(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            set_grads(model, step)
            optimizer.step(1e-2)

    whole, first, second = start(), start(), start()
    go(*whole, range(6))
    go(*first, range(3))
    saved = first[1].state()
    second[1].restore({**saved, "tensors": {k: v.clone() for k, v in saved["tensors"].items()}})
    go(*second, range(3, 6))
    parameters: list[tuple[Tensor, Tensor]] = list(
        zip(whole[0].parameters(), second[0].parameters(), strict=True)
    )
    assert all(torch.equal(p, q) for p, q in parameters)
    tensors = second[1].state()["tensors"]
    assert all(torch.equal(v, tensors[k]) for k, v in whole[1].state()["tensors"].items())


def test_parameters_without_a_gradient_stay() -> None:
    model = Small()
    set_grads(model, 0)
    model.other.grad = None
    before = model.other.detach().clone()
    Optimizer(model, train_config(weight_decay=0.5)).step(0.1)
    assert torch.equal(model.other, before)
