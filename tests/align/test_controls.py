"""What makes controls cheap changes no bit of them, and nothing outside of them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import markov
import pytest
import torch

from glm_core.align.controls import control_modes, train_control
from glm_core.align.disguise import Rounded, unchanged_unseen
from glm_core.align.training import Mode, Run, free_run, moved
from glm_core.config import RunConfig
from glm_core.conformance.oracle import EagerMode
from glm_core.training.parallel import initial_weights


class Seen(EagerMode):
    """Collects the names of the operators that a mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names = list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def trained(config: RunConfig, mode: Mode, around: Any) -> tuple[list[float], list[torch.Tensor]]:
    """Returns losses and last weights of a run."""
    run = Run(config, markov.Markov(), "reference", moved(initial_weights(config), 1), mode)
    with around():
        loss = free_run(run).loss.tolist()
    return loss, list(run.optimizer.master.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_control_has_the_bits_it_has_when_its_mode_sees_everything(dtype: Any) -> None:
    config = markov.config(dtype, steps=2)
    _, mode = control_modes(config, 4)[1]
    loss, weights = trained(config, mode, nullcontext)
    _, same = trained(config, mode, lambda: unchanged_unseen(getattr(torch, dtype)))
    assert all(map(torch.equal, weights, same))
    _, plain = trained(config, nullcontext, nullcontext)
    assert not all(map(torch.equal, weights, plain)), "the mode does something"
    assert train_control(config, 1, 4, markov.Markov, lambda *_: None).loss == loss


def test_views_and_conversions_are_unseen_in_the_block_alone() -> None:
    x, seen = torch.ones(2, 3), Seen()
    with seen, unchanged_unseen(torch.bfloat16):
        (x.t()[0].unflatten(0, (1, -1)).bfloat16() * 2).float()
    assert seen.names == ["mul"]
    with seen, unchanged_unseen(torch.float32):
        x.t() * 2
    assert seen.names == ["mul"]
    with seen:
        x.t() * 2
    assert seen.names == ["mul", "t", "mul"]


def test_what_others_hold_is_not_rounded_in_place() -> None:
    for seed in range(4):
        x, mode = torch.full((8,), 1.001), Rounded(torch.bfloat16, 1, seed=seed)
        with mode:
            x.mul_(1.001)
            fresh = x * 1.0
        assert torch.equal(x, torch.full((8,), 1.001).mul_(1.001))
        chosen = torch.equal(fresh, x.bfloat16().float())
        assert chosen or torch.equal(fresh, x)
