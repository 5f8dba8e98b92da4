"""Checks deepspeed.checkpointing in one process: generators, what is kept, and what has no
effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import glm_core.deepspeed as deepspeed
from glm_core.deepspeed.runtime.activation_checkpointing import checkpointing
from glm_core.errors import ConfigError


@pytest.fixture(autouse=True)
def _as_imported() -> Iterator[None]:
    state = mock.patch.object(checkpointing, "_state", checkpointing._State())
    with state, mock.patch.object(checkpointing, "_tracker", checkpointing.CudaRNGStatesTracker()):
        torch.manual_seed(0)
        yield


def run(x: Tensor, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Runs two dropouts, one with the tracker's generator. Returns the output, the gradient, and
    what the generators draw afterwards."""
    torch.manual_seed(1)
    checkpointing.model_parallel_cuda_manual_seed(3)
    weight = torch.ones(64, requires_grad=True)

    def layer(v: Tensor) -> Tensor:
        v = nn.functional.dropout(v * weight, 0.5).sin()
        with checkpointing.get_cuda_rng_tracker().fork():
            v = nn.functional.dropout(v, 0.5)
        return v.cos() * v

    out = deepspeed.checkpointing.checkpoint(layer, x) if again else layer(x)
    out = checkpointing.checkpoint(layer, out) if again else layer(out)
    out.sum().backward()
    assert weight.grad is not None
    with checkpointing.get_cuda_rng_tracker().fork():
        after = torch.rand(3)
    return out, weight.grad, torch.cat([torch.rand(3), after])


@pytest.mark.parametrize("options", [{}, {"checkpoint_in_cpu": True}])
def test_every_generator_draws_again_what_it_drew(options: dict[str, bool]) -> None:
    checkpointing.configure(None, **options)
    x = torch.randn(64)  # needs no gradient: a reentrant checkpoint would lose the weight's
    for plain, recomputed in zip(run(x, False), run(x, True), strict=True):
        assert torch.equal(plain, recomputed)


def test_a_forgotten_generator_would_be_seen() -> None:
    x = torch.randn(64)
    right = run(x, False)[1]
    with mock.patch.object(
        checkpointing,
        "_recomputing",
        lambda session, states: checkpointing.dispatch.resume(session),
    ):
        assert not torch.equal(run(x, True)[1], right)


def test_only_the_inputs_are_kept() -> None:
    checkpointing.configure(None, checkpoint_in_cpu=True)
    kept: list[Any] = []
    right = checkpointing._pack
    with mock.patch.object(checkpointing, "_pack", lambda x: kept.append(x.shape) or right(x)):
        x = torch.randn(7, requires_grad=True)
        checkpointing.checkpoint(lambda v, n: v.sin().exp() ** n, x, 3).sum().backward()
    assert [shape for shape in kept if shape.numel()] == [(7,)]  # torch 2.7 keeps an empty one too
    want = torch.autograd.grad(
        (y := x.detach().clone().requires_grad_()).sin().exp().pow(3).sum(), y
    )
    assert torch.equal(x.grad, want[0])


def test_keywords_tuples_and_the_function_object() -> None:
    x = torch.randn(4, requires_grad=True)
    a, b = checkpointing.checkpoint(lambda v, scale: (v * scale, v.sin()), x, scale=2.0)
    outputs: list[Tensor] = []
    checkpointing.CheckpointFunction.apply(lambda v: (v * 2.0, v.sin()), outputs, x)
    assert torch.equal(a, outputs[0])
    assert torch.equal(b, outputs[1])


def test_configure_reads_the_section_and_arguments_go_before(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert not checkpointing.is_configured()
    section = {"cpu_checkpointing": True, "partition_activations": True, "profile": True}
    config = {"train_batch_size": 1, "activation_checkpointing": section}
    checkpointing.configure(None, deepspeed_config=config, partition_activations=False)
    assert checkpointing.is_configured()
    assert (checkpointing._state.in_cpu, checkpointing._state.partition) == (True, False)
    checkpointing.configure(None, contiguous_checkpointing=True, num_checkpoints=4)
    assert (checkpointing._state.in_cpu, checkpointing._state.partition) == (False, False)
    assert "contiguous_checkpointing has no effect" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"did you mean activation_checkpointing\.profile"):
        checkpointing.configure(None, {"activation_checkpointing": {"profil": True}})


def test_the_tracker_refuses_what_would_repeat() -> None:
    tracker = checkpointing.get_cuda_rng_tracker()
    checkpointing.model_parallel_cuda_manual_seed(3)
    assert tracker.seeds_ == {3 + 2718}
    for name, seed in (("model-parallel-rng", 1), ("other", 2721)):
        with pytest.raises(ConfigError, match="call reset"):
            tracker.add(name, seed)
    with pytest.raises(ConfigError, match="no state 'other'"), tracker.fork("other"):
        pass
    before = torch.get_rng_state()
    with tracker.fork():
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), before)
    checkpointing.model_parallel_reconfigure_tp_seed(3)
    with tracker.fork():
        first = torch.rand(1)
    torch.manual_seed(3 + 2718)
    assert torch.equal(torch.rand(1), first)
