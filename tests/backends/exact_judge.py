"""Compares the exact GPU kernels, executed on the CPU with one fiber per thread, with backend
`cpu`, bit for bit: `python exact_judge.py LIBRARY WAVE STEPS MODEL:DTYPE ...` prints {case: the
results that differ}, the same of models trained so many steps, and how often each kernel ran. A
process of its own, as for fibers_judge."""

from __future__ import annotations

import ctypes
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any
from unittest import mock

import fibers_judge
import torch

from glm_core import ops
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.backends.cpu import backend as cpu
from glm_core.backends.cuda import attention, experts
from glm_core.backends.cuda.kernels import linear_few, share
from glm_core.backends.cuda.supports import EXACT, EXACT_DTYPES
from glm_core.config import DataConfig, RunConfig, TrainConfig
from glm_core.conformance.case import Case, select
from glm_core.conformance.oracle import Results, compute
from glm_core.model.presets import preset
from glm_core.spec import Sample, integers, normal
from glm_core.training.parallel import SingleProcess
from glm_core.training.trainer import Trainer
from tests.shared.toy import L, Sampler, V

MOST = {torch.float32: 2, torch.bfloat16: 1}
"""how many of an op's samples; what they lack is in SHAPES"""
OPERATORS = torch.ops.glm_core
HALVES = {
    f"{op}_{way}": module
    for op, module in experts.MODULES.items()
    if op in EXACT
    for way in ("forward", "backward")
}
"""experts' operators, and the module of their Triton kernels"""


def ends(queries: int, keys: int) -> dict[str, Any]:
    """Returns intervals whose first keys are no multiples of anything; one query sees nothing."""
    first = torch.arange(queries).int()[None] % 5
    last = (torch.arange(queries).int()[None] + keys - queries + 1).clamp(max=keys)
    last[0, queries // 2] = 0
    return {"key_start": lambda draw: first, "key_end": lambda draw: last, "scale": 0.3}


def heads(queries: int, keys: int, num_heads: int, kv_heads: int, e: int, c: int) -> dict[str, Any]:
    return {
        "q": normal(1, queries, num_heads, e),
        "k": normal(1, keys, kv_heads, e),
        "v": normal(1, keys, kv_heads, c),
        **ends(queries, keys),
    }


SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "linear": {
        "tiles": {"x": normal(37, 70), "weight": normal(45, 70), "bias": normal(45)},
        "one-row": {"x": normal(1, 49), "weight": normal(33, 49)},
    },
    "attention": {
        "two-tiles": heads(67, 67, 4, 2, 9, 7),
        "two-blocks": heads(3, 530, 2, 1, 5, 6),
        "one-query": heads(1, 70, 2, 2, 8, 8),
        "sharp": {**heads(5, 40, 2, 1, 9, 7), "scale": 25.0},  # denormal probabilities
    },
    "add_layer_norm": {
        "three-blocks": {
            "x": normal(18, 1100),
            "residual": normal(18, 1100),
            "weight": normal(1100),
            "bias": normal(1100),
            "alpha": 1.7,
        }
    },
    "rms_norm": {"nine-blocks": {"x": normal(2, 4500), "weight": normal(4500)}},
    "swiglu": {"all-exponents": {"x": normal(9, 2 * 501, std=30.0)}},
    "geglu": {"wide": {"x": normal(9, 2 * 501, std=3.0)}},
    "linear_cross_entropy": {
        "two-blocks": {
            "x": normal(35, 20),
            "weight": normal(700, 20),
            "labels": integers(0, 700, 35),
            "token_weight": normal(35, wide=True),
        },
        "sharp": {
            "x": normal(4, 20, std=6.0),
            "weight": normal(300, 20),
            "labels": integers(0, 300, 4),
            "token_weight": normal(4, wide=True),
        },
    },
    "global_norm": {"stretches": {"tensors": [normal(33000), normal(5), normal(16384)]}},
    "route": {
        "tails": {
            "x": normal(21, 70),
            "weight": normal(37, 70, std=0.1, wide=True),
            "bias": normal(37, std=0.1, wide=True),
            "top_k": 5,
            "scale": 1.8,
        },
    },
    "unpermute": {
        "three-blocks": {
            "rows": normal(15, 1100),
            "order": lambda draw: torch.arange(15).roll(4),
            "weights": normal(5, 3, wide=True),
        },
    },
    "grouped_linear": {
        "tails": {
            "rows": normal(47, 70),
            "weight": normal(4, 37, 70),
            "counts": lambda draw: torch.tensor([1, 37, 0, 9]),
        },
    },
}
"""op -> name -> arguments that reach past tiles, blocks and lanes"""


class OnFibers(fibers_judge.OnFibers):
    """Sends the operators of experts through `device_half`, as a GPU does."""

    def __init__(self, library: str) -> None:
        halves = ("linear_forward", "attention_forward", "attention_backward")
        with mock.patch.object(fibers_judge, "LEAVES", (*fibers_judge.LEAVES, *halves)):
            super().__init__(library)
        self.calls |= dict.fromkeys(HALVES, 0)
        self.own = torch.library.Library("glm_core", "FRAGMENT")
        for name in (f"exact_{half}" for half in HALVES):
            kernel = getattr(torch.ops.glm_core_fibers, name).default
            self.own.define(str(kernel._schema).removeprefix("glm_core_fibers::"))
            self.own.impl(name, kernel, "CPU")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "glm_core" and func._opname in HALVES:
            self.calls[func._opname] += 1
            return experts.device_half(HALVES[func._opname], func._opname)(*args)
        return super().__torch_dispatch__(func, types, args, kwargs)


def on_fibers() -> Backend:
    """Returns a backend with the functions of `cuda`, for tensors on the CPU."""
    backend = Backend(name="fibers", device_type="cpu", verified="executed", exact=cpu.exact)
    share(backend)
    backend.implements(ops.linear)(linear_few)
    backend.implements(ops.attention)(attention.attention)
    experts.equip(backend)
    return backend


def cases(backend: Backend) -> Iterator[Case]:
    """Yields the first samples of every op that has exact kernels, and our own."""
    left = Counter[tuple[str, str, torch.dtype]]()
    for case in select(backend, dtypes=EXACT_DTYPES, real=False):
        key = case.op.name, case.mode, case.dtype
        left[key] += 1
        wanted = left[key] <= MOST[case.dtype] or "-ti" in case.id  # tiny, tied
        if case.op.name in EXACT and not case.raises and wanted:
            yield case
    for name, shapes in SHAPES.items():
        op = ops.all_ops()[name]
        for id, args in shapes.items():
            for mode in ("test", "grad") if op.differentiable else ("test",):
                yield from (Case(op, Sample(id, args), dtype, mode) for dtype in EXACT_DTYPES)


def computed(case: Case, backend: Backend, mode: Any) -> Results:
    args = case.sample.make(case.dtype)
    with registry.use(backend, exact=True), mode:
        return {k: t.clone() for k, t in compute(case, case.op, args).items()}


def differing(expected: Results, received: Results) -> str:
    """Names the results with other bits; '' where there are none."""
    assert expected.keys() == received.keys()
    wrong = []
    for name, want in expected.items():
        a, b = (t.contiguous().view(-1).view(torch.uint8) for t in (want, received[name]))
        if not torch.equal(a, b):
            wrong.append(f"{name}: {int((a != b).sum())} of {a.numel()} bytes")
    return ", ".join(wrong)


SMALL = {"num_layers": 2, "hidden": 48, "ffn": 40, "vocab": V, "max_length": L}
MODELS = {
    "glm-base": {"num_heads": 2},  # layer norm, gelu, learned positions, biases
    "glm-130b": {"num_heads": 2},  # DeepNorm, geglu, rope
    "chatglm-6b": {"num_heads": 2},  # two rows of positions
    "glm-4-9b": {"num_heads": 4, "num_kv_heads": 2},  # RMS norm, swiglu, pairs of neighbours
    "tiny-moe": {"num_heads": 4, "num_kv_heads": 2, "expert_ffn": 24, "balance_weight": 0.0},
}


def trained(what: str, backend: Backend, mode: Any, steps: int) -> Results:
    """Returns losses, gradient norms and weights after a few steps of two sequences; `what` is
    MODEL:DTYPE."""
    name, dtype = what.split(":")
    train = TrainConfig(
        exact=True, micro_batch=1, global_batch=2, steps=steps, warmup_steps=1, dtype=dtype
    )
    model = preset(name, **{**SMALL, "head_dim": None, **MODELS[name]})
    config = RunConfig(model=model, data=DataConfig(length=L, vocab=V), train=train)
    trainer = Trainer(config, Sampler(), parallel=SingleProcess(config, backend))
    with registry.use(backend, exact=True), mode:
        done = [trainer.step() for _ in range(steps)]
    figures = torch.tensor([(r.loss, r.grad_norm) for r in done], dtype=torch.float64)
    assert figures.isfinite().all()
    return {"figures": figures, **trainer.optimizer.master}


def main(library: str, wave: str, steps: str, *models: str) -> None:
    mode = OnFibers(library)
    ctypes.CDLL(library).glm_fibers_configure(int(wave), ctypes.c_uint64(1))
    fibers, none = on_fibers(), nullcontext()
    found = {}
    for case in cases(fibers):
        found[case.id] = differing(computed(case, cpu, none), computed(case, fibers, mode))
    fast = {}
    for case in (c for c in cases(fibers) if c.op.name in ("swiglu", "rms_norm")):
        with registry.use(fibers), mode:
            other = compute(case, case.op, case.sample.make(case.dtype))
        fast[case.op.name] = fast.get(case.op.name) or differing(computed(case, cpu, none), other)
    both = [(cpu, none), (fibers, mode)]
    weights = {n: differing(*(trained(n, *each, int(steps)) for each in both)) for n in models}
    json.dump({"found": found, "fast": fast, "models": weights, "calls": mode.calls}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
