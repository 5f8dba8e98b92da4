"""The router's bias and the auxiliary loss bring the experts to equal loads, in a trainer too."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import Tensor

from glm_core import dispatch, ops
from glm_core.backends import registry
from glm_core.config import RunConfig
from glm_core.model.balance import sequence_balance
from glm_core.model.glm import GLM
from glm_core.training import checkpoint
from glm_core.training.balance import moved_bias
from glm_core.training.parallel import SingleProcess
from glm_core.training.run import run
from glm_core.training.trainer import Trainer

N, D, X, T = 256, 16, 8, 2
RATE = 0.01


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


def test_the_loss_is_that_of_a_hand_calculation() -> None:
    # sigmoid(0) = 1/2 and sigmoid(log 3) = 3/4: shares (2, 2, 3)/7 and (2, 3, 2)/7 of the scores
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    weight = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]) * math.log(3.0)
    experts = torch.tensor([[[2], [1]], [[2], [2]]])
    # first: f = (0, 1.5, 1.5), p = (2, 2.5, 2.5)/7; second: f = (0, 0, 3), p = (2, 2, 3)/7
    found = sequence_balance(x, weight, experts)
    assert found.tolist() == pytest.approx([7.5 / 7, 9 / 7])


def test_the_loss_is_one_where_loads_are_even_and_more_where_they_are_not() -> None:
    even = torch.arange(N * T).reshape(1, N, T) % X
    x, weight = torch.zeros(1, N, D), torch.zeros(X, D)
    assert float(sequence_balance(x, weight, even)) == pytest.approx(1.0)
    x, weight = drawn()
    experts, _ = ops.route(x, weight, torch.zeros(X), T)
    assert float(sequence_balance(x[None], weight, experts[None])) > 1.1


def test_a_step_down_the_loss_evens_the_loads() -> None:
    x, weight = drawn()
    before = counts_of(x, weight, torch.zeros(X))
    for _ in range(30):
        leaf = weight.clone().requires_grad_()
        experts, _ = ops.route(x, leaf.detach(), torch.zeros(X), T)
        loss = sequence_balance(x[None], leaf, experts[None]).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        weight = weight - 1.0 * gradient
    after = counts_of(x, weight, torch.zeros(X))
    assert int(after.max()) < int(before.max())


# in a trainer -------------------------------------------------------------------------


def config(dtype: str = "float32", rate: float = RATE, weight: float = 0.1, **k: Any) -> RunConfig:
    fixed = {"steps": 4, "ramp_from": 0, "save_every": 0}
    model: dict[str, Any] = toy.SPARSE | {"balance_weight": weight}
    return toy.config(model, dtype=dtype, balance_rate=rate, **fixed | k)


def biases(trainer: Trainer) -> dict[str, Tensor]:
    named = trainer.model.named_parameters()
    return {n: p.detach().clone() for n, p in named if n.endswith("router.bias")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trainer_moves_each_bias_by_what_its_router_chose(dtype: str) -> None:
    trainer = Trainer(config(dtype), toy.Sampler())
    chosen: list[Tensor] = []

    def watch(op: Any, args: Any, kwargs: Any) -> Any:
        out = dispatch.run(op, args, kwargs)
        if op is ops.route:
            chosen.append(torch.bincount(out[0].flatten(), minlength=X).float())
        return out

    with registry.use("reference"):
        before = biases(trainer)
        for _ in range(2):
            chosen.clear()
            with dispatch.intercept(watch):
                result = trainer.step()
            after = biases(trainer)
            assert len(after) == 2
            assert len(chosen) == 2 * 3
            for i, (name, bias) in enumerate(after.items()):
                counts = chosen[i] + chosen[i + 2] + chosen[i + 4]
                right = before[name] + RATE * torch.sign(counts.mean() - counts)
                assert torch.equal(bias, right)
                assert bool(bias.any())
                assert torch.equal(bias, trainer.optimizer.master[name])
                assert bias.dtype == torch.float32
                expected = (counts / counts.mean()).tolist()
                assert result.expert_load[i] == pytest.approx(expected, abs=1e-4)
            before = after


def test_the_loss_and_its_gradient_do_not_depend_on_the_micro_batch() -> None:
    losses, gradients = [], []
    for size, weight in ((2, 0.1), (6, 0.1), (6, 0.0)):
        trainer = Trainer(config(weight=weight, micro_batch=size), toy.Sampler())
        with registry.use("reference"):
            losses.append(float(trainer.backward(trainer.batches())))
        gradients.append(
            {n: p.grad for n, p in trainer.model.named_parameters() if n.endswith("router.weight")}
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[1] - losses[2] > 0.1  # two sparse layers of at least 0.1 each, less a share
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradient, gradients[1][name])
        assert not torch.allclose(gradient, gradients[2][name], rtol=1e-2)


def test_a_rate_of_zero_and_a_frozen_bias_leave_the_bias() -> None:
    still = Trainer(config(rate=0.0), toy.Sampler())
    model = GLM(config().model).init_weights(0)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("router.bias"))
    parallel = SingleProcess(config(), model=model)
    frozen = Trainer(config(), toy.Sampler(), parallel)
    dense = Trainer(toy.config(), toy.Sampler())
    with registry.use("reference"):
        results = [trainer.step() for trainer in (still, frozen, dense)]
    assert not any(b.any() for t in (still, frozen) for b in biases(t).values())
    assert [len(r.expert_load) for r in results] == [2, 0, 0]
    assert "expert_load" not in results[2].figures()


def test_a_resumed_run_has_the_biases_and_loads_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    c = config("bfloat16", save_every=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(c, whole, sampler=toy.Sampler())
    run(c, parts, sampler=toy.Sampler(), resume=whole / "checkpoints/step-00000002.safetensors")
    saved = [
        checkpoint.load(f / "checkpoints/step-00000004.safetensors")[0] for f in (whole, parts)
    ]
    found = [k for k in saved[0] if k.endswith("router.bias") and k.startswith("master.")]
    assert len(found) == 2
    assert all(saved[0][k].any() for k in found)
    assert all(torch.equal(saved[0][k], saved[1][k]) for k in saved[0])
    rows = [
        [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (whole, parts)
    ]
    for line, again in zip(rows[0][2:], rows[1], strict=True):
        assert line["expert_load"] == again["expert_load"]
        assert line["expert_load_ratio"] == max(map(max, line["expert_load"])) > 1
