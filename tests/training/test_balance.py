"""The router's bias and the auxiliary loss bring the experts to equal loads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glm_core import ops
from glm_core.training.balance import balance_loss, moved_bias

N, D, X, T = 256, 16, 8, 2


def drawn() -> tuple[Tensor, Tensor]:
    """Returns tokens and a router that prefers the first experts."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=g)
    x[:, 0] = 1.0
    weight = torch.randn(X, D, generator=g) * 0.2
    weight[:, 0] = torch.linspace(1.0, -1.0, X)
    return x, weight


def counts_of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    experts, _ = ops.route(x, weight, bias, T)
    return torch.bincount(experts.flatten(), minlength=X)


def test_the_bias_moves_by_one_rate_towards_the_mean() -> None:
    bias = moved_bias(torch.zeros(3), torch.tensor([7, 4, 1]), 0.01)
    assert bias.tolist() == pytest.approx([-0.01, 0.0, 0.01])


def test_a_moving_bias_evens_the_loads() -> None:
    x, weight = drawn()
    bias = torch.zeros(X)
    first = counts_of(x, weight, bias)
    for _ in range(100):
        bias = moved_bias(bias, counts_of(x, weight, bias), 0.01)
    last = counts_of(x, weight, bias)
    assert first.max() > 2 * N * T / X
    assert last.max() < 1.25 * N * T / X


def test_the_loss_is_one_where_loads_are_even_and_more_where_they_are_not() -> None:
    even = torch.arange(N * T).reshape(N, T) % X
    x, weight = torch.zeros(N, D), torch.zeros(X, D)
    assert float(balance_loss(x, weight, even)) == pytest.approx(1.0)
    x, weight = drawn()
    experts, _ = ops.route(x, weight, torch.zeros(X), T)
    assert float(balance_loss(x, weight, experts)) > 1.1


def test_a_step_down_the_loss_evens_the_loads() -> None:
    x, weight = drawn()
    before = counts_of(x, weight, torch.zeros(X))
    for _ in range(30):
        leaf = weight.clone().requires_grad_()
        experts, _ = ops.route(x, leaf.detach(), torch.zeros(X), T)
        (gradient,) = torch.autograd.grad(balance_loss(x, leaf, experts), leaf)
        weight = weight - 1.0 * gradient
    after = counts_of(x, weight, torch.zeros(X))
    assert int(after.max()) < int(before.max())
