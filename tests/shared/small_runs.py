"""Captures three steps of each small model of the sensitivity campaign, on made-up text with real
masks."""

from __future__ import annotations

import functools

import torch

from glm_core import dispatch
from glm_core.align.capture import Call
from glm_core.align.replay import Results, replay
from glm_core.align.training import Run, free_run
from glm_core.backends.base import Backend
from glm_core.config import RunConfig
from glm_core.data.sampler import Batch
from glm_core.sensitivity import setups

STEPS = 3


def rows(config: RunConfig) -> Batch:
    """Returns random tokens: half of the sequences hold two packed samples, the last is padded."""
    number, length = config.train.steps * config.train.global_batch, config.data.length
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.data.vocab, (number, length), generator=generator)
    half, end = length // 2, length - 7
    start = torch.zeros(number, length, dtype=torch.int32)
    start[::2, half:] = half
    place = torch.arange(length, dtype=torch.int32) - start
    prefix = start + 11
    key_end = torch.maximum(start + place + 1, prefix)
    key_end[::2, :half].clamp_(max=half)
    weight = (place >= 11).float()
    at = torch.arange(end, length, dtype=torch.int32)
    start[-1, end:], key_end[-1, end:], weight[-1, end:] = at, at + 1, 0.0
    return Batch(
        tokens=tokens,
        labels=tokens.roll(-1, 1),
        loss_weight=weight,
        positions=torch.stack((place, (place - 11).clamp(min=0)), 1).long(),
        key_start=start,
        key_end=key_end,
    )


@functools.cache
def step_calls(setup: str, dtype: str) -> list[Call]:
    """Returns every op call of the first steps of a setup's reference run."""
    config = setups.config(setup, dtype, STEPS)
    run = Run(config, setups.Drawn(rows(config)), "reference")
    return free_run(run, tuple(range(1, STEPS + 1))).calls


def two_steps(setup: str) -> Run:
    """Returns a setup's reference run in float32 after two steps."""
    config = setups.config(setup, "float32", 2)
    run = Run(config, setups.Drawn(rows(config)), "reference")
    free_run(run)
    return run


def outcomes(backend: Backend, calls: list[Call]) -> list[Results]:
    """Returns the backend's results of the calls for whose ops it has kernels, both directions."""
    with dispatch.activate(backend):
        return [replay(c, c.op) for c in calls if c.op.name in backend.kernels]


_references: dict[tuple[int, int], Results] = {}


def reference(call: Call) -> Results:
    """Returns the reference's results of one of `step_calls`, computed once with this many
    threads."""
    key = id(call), torch.get_num_threads()
    if key not in _references:
        _references[key] = replay(call, call.op.reference)
    return _references[key]


def differs(backend: Backend, calls: list[Call]) -> bool:
    """Says whether any bit of any result differs from the reference's."""
    for call in calls:
        if call.op.name in backend.kernels:
            (found,), right = outcomes(backend, [call]), reference(call)
            if any(not torch.equal(found[n], right[n]) for n in right):
                return True
    return False
