"""Judges a backend's whole decode steps: small models of the published shapes must get the bits
that the backend's ops give one by one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from glm_core import dispatch
from glm_core.backends.base import Backend
from glm_core.backends.registry import use
from glm_core.conformance.case import dtype_name, without
from glm_core.conformance.report import DECODE, Report
from glm_core.conformance.run import Outcome, Progress, result_of
from glm_core.errors import GlmCoreError, in_one_line
from glm_core.measure.timing import machine
from glm_core.model.glm import GLM
from glm_core.model.presets import preset
from glm_core.model.prompt import Prompt, causal
from glm_core.model.quantize import Quantization, convert
from glm_core.model.runner import DecodeRow, Runner, idle
from glm_core.model.stack import angles, stack
from glm_core.spec import Support

V, LENGTH, STEPS = 61, 48, 4
IDLE = 2
"""the step in which the first row is idle"""
PRESETS = (
    *("glm-base", "glm-130b", "chatglm-6b", "glm-4-9b", "glm-4-0414-9b"),
    *("glm-4.7", "glm-4.7-flash"),
)
SPARSE = {"num_experts": 8, "experts_per_token": 3, "expert_ffn": 384, "num_dense_layers": 1}
SPARSE |= {"num_mtp_layers": 0}
LATENT = {"kv_latent": 128, "q_latent": 128, "rope_head_dim": 16, "value_head_dim": 32}
WEIGHTS: dict[str, Quantization | None] = {
    "plain": None,
    "int4": Quantization(bits=4),
    "int4-group32-a8": Quantization(bits=4, group=32, activation_bits=8),
    "int8-group128-a8": Quantization(bits=8, group=128, activation_bits=8),
}


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeCase:
    """A small model that takes a few decode steps."""

    preset: str
    dtype: torch.dtype
    weights: str
    """a key of WEIGHTS"""

    @property
    def id(self) -> str:
        """Returns the id, which is also the filter on the command line."""
        return f"{DECODE}-{dtype_name(self.dtype)}-{self.preset}-{self.weights}"

    def model(self) -> GLM:
        """Returns the model."""
        return built(self.preset, self.dtype, WEIGHTS[self.weights])


def built(
    name: str,
    dtype: torch.dtype = torch.float32,
    how: Quantization | None = None,
    **changes: int,
) -> GLM:
    """Returns a small model in the shapes of a published one, with `changes`: two layers, grouped
    heads if it has them, and an ffn width that is no multiple of a vector. With experts, the first
    layer is dense."""
    published = preset(name)
    kv = 2 if published.num_kv_heads != published.num_heads else 4
    sizes = {"num_layers": 2, "hidden": 128, "num_heads": 4, "num_kv_heads": kv, "head_dim": 32}
    sizes |= {"ffn": 384, "vocab": V, "max_length": LENGTH}
    sizes |= SPARSE if published.num_experts else {}
    sizes |= LATENT if published.kv_latent else {}
    small = preset(name, **(sizes | changes))
    model = GLM(small).init_weights(3).to(dtype).requires_grad_(False)
    for p in model.parameters():
        if p.ndim == 1:  # biases of zero and norms of one would hide one left out
            p.add_(torch.linspace(-0.1, 0.1, len(p), dtype=p.dtype))
    for _ in convert(model, how) if how else ():
        pass
    return model


def every_case(backend: Backend) -> Iterator[DecodeCase]:
    """Yields every preset in every dtype of the backend, with plain and quantised weights."""
    for dtype in backend.dtypes:
        for name in PRESETS:
            yield from (DecodeCase(name, dtype, weights) for weights in WEIGHTS)


def run(
    backend: Backend,
    *,
    id: str | None = None,
    skip: Sequence[str] = (),
    progress: Progress | None = None,
) -> Report:
    """Judges the cases that match. Raises GlmCoreError where none does."""
    cases = [c for c in every_case(backend) if id is None or fnmatchcase(c.id, id)]
    if not cases:
        raise GlmCoreError(
            f"unknown decode case {id!r}; ids look like {next(every_case(backend)).id}"
        )
    wanted, results = without([c.id for c in cases], skip), []
    cases = [c for c in cases if c.id in wanted]
    for number, case in enumerate(cases):
        if progress is not None:
            progress(number, len(cases), case.id)
        start = time.perf_counter()
        results.append(result_of(case.id, backend, _outcome(case, backend), start))
    if progress is not None:
        progress(len(cases), len(cases), "")
    return Report(backend.name, results, machine(), tuple(skip))


def _outcome(case: DecodeCase, backend: Backend) -> Outcome:
    try:
        model = case.model().to(backend.device())
        step = whole_step(model, backend)
        if isinstance(step, Support):
            return "unsupported", None, step.reason, {}
        with use(backend):
            reason = difference(model, min(3, step.max_rows))
    except Exception as error:  # a vendor's step may raise anything; the report carries it
        reason = in_one_line(error)
    return "fail" if reason else "pass", None, reason, {}


def whole_step(model: GLM, backend: Backend) -> Any:
    """Returns the backend's decode step for the model, or why there is none."""
    parts = stack(model, lambda: angles(model, LENGTH))
    return parts if isinstance(parts, Support) else backend.decode_step(parts)


def prompts(rows: int) -> list[Prompt]:
    """Returns prompts of different lengths, causal ones and others in turn."""
    return [
        Prompt(tuple(range(7, 12 + b)), sep=4, mask=2) if b % 2 else causal(range(9, 15 + 3 * b))
        for b in range(rows)
    ]


def difference(model: GLM, rows: int) -> str:
    """Returns in words where the active backend's whole steps give other bits than its ops; empty
    where they give the same."""
    runs = (decoded(model, prompts(rows), STEPS, whole=w) for w in (True, False))
    (ours, cache), (expected, expected_cache) = runs
    for step, (a, b) in enumerate(zip(ours, expected, strict=True), 1):
        for row in range(rows):
            if not torch.equal(a[row], b[row]):
                off = float((a[row] - b[row]).abs().max())
                fact = "the logits are not those of the ops"
                return f"step {step}, row {row}: {fact}, off by {off:.2e}"
    if not torch.equal(cache, expected_cache):
        return "the keys and values in the cache are not those of the ops"
    return ""


def decoded(
    model: GLM, prompts: Sequence[Prompt], steps: int, *, whole: bool
) -> tuple[list[Tensor], Tensor]:
    """Runs steps of sequences of different lengths, padded on the left to one; the first is idle in
    step IDLE. The active backend takes each in one call if `whole`, else op by op. Returns the
    logits [B, V] of each step, and what the cache holds at the end."""
    runner, length = Runner(model, len(prompts)), max(len(p.tokens) for p in prompts)
    runner.prefill(0, prompts)
    pads = [length - len(p.tokens) for p in prompts]
    called, logits = 0, []

    def watch(op: dispatch.Op, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        nonlocal called
        called += 1
        return dispatch.run(op, args, kwargs)

    for step in range(steps):
        fed = [
            DecodeRow(20 + step + b, prompt, len(prompt.tokens) + step, pads[b])
            for b, prompt in enumerate(prompts)
        ]
        if step == IDLE:
            fed[0] = idle(length + step)
        with dispatch.intercept(None if whole else watch):
            logits.append(runner.decode(fed))
    assert whole or called
    return logits, runner.cache.memory
