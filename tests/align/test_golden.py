"""Traces recorded once and kept in the repository: today's reference must still train to the same
curve, on any CPU, within what honest rounding does to it.

Not the same bits: another instruction set sums in another order, fuses other multiply-adds and has
another exp and erf. The envelope of the recorded controls (weights one ulp away, other orders of
summation, in bfloat16 intermediates rounded) covers that; starting weights and data must be the
same to the bit. Recorded anew, after a deliberate change of the arithmetic, by
`python tests/align/test_golden.py`."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glm_core import align, ops
from glm_core.align.trace import Trace, load
from glm_core.align.training import Run, free_run, weights_hash
from glm_core.config import DataConfig, Dtype, ModelConfig, RunConfig, TrainConfig
from glm_core.data.sampler import Batch
from glm_core.dispatch import Op
from glm_core.training.parallel import initial_weights

FOLDER = Path(__file__).parent / "golden"
MAX_BYTES = 100_000
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
V, L = 64, 16


class Text:
    """Makes sequences in which a token is a function of the two before it, after a prefix that
    every token sees."""

    def __init__(self) -> None:
        self.index = 0

    def next(self, micro_batch: int) -> Batch:
        tokens, sep = self._tokens(micro_batch)
        self.index += micro_batch
        place = torch.arange(L).expand(micro_batch, L)
        return Batch(
            tokens=tokens[:, :L],
            labels=tokens[:, 1:],
            loss_weight=(place >= sep).float(),
            positions=torch.stack((place, (place - sep + 1).clamp(min=0)), 1),
            key_start=torch.zeros(micro_batch, L, dtype=torch.int32),
            key_end=torch.maximum(place + 1, sep).int(),
        )

    def _tokens(self, rows: int) -> tuple[Tensor, Tensor]:
        """Returns tokens [B, L + 1] and prefix lengths [B, 1], by integer arithmetic, which is the
        same on every machine."""
        number = torch.arange(self.index, self.index + rows)[:, None]
        columns = [number[:, 0] * 7 % V, number[:, 0] * 11 % V]
        for i in range(L - 1):
            columns.append((columns[-1] * 5 + columns[-2] * 3 + i % 4 + number[:, 0] % 3) % V)
        return torch.stack(columns, 1), 2 + number * 5 % (L - 4)

    def state(self) -> dict[str, Any]:
        return {"index": self.index}

    def restore(self, state: dict[str, Any]) -> None:
        self.index = state["index"]


def config(dtype: Dtype) -> RunConfig:
    """A small GLM-130B: DeepNorm, GeGLU, rotary positions, query-key layer scaling, shrink 0.1."""
    return RunConfig(
        model=ModelConfig(
            num_layers=2,
            hidden=32,
            num_heads=2,
            ffn=86,
            vocab=V,
            max_length=L,
            qk_layer_scaling=True,
            embedding_gradient_shrink=0.1,
            init_std=0.2,
        ),
        data=DataConfig(vocab=V, length=L),
        train=TrainConfig(
            backend="reference",
            dtype=dtype,
            steps=12,
            micro_batch=4,
            global_batch=8,
            warmup_steps=3,
            lr=3e-3,
        ),
    )


def golden(dtype: Dtype) -> Trace:
    return load(FOLDER / f"reference-{dtype}.trace")


def trained(dtype: Dtype) -> Trace:
    """Returns the golden trace with today's curve in place of its own."""
    run = Run(config(dtype), Text(), "reference")
    curve = free_run(run)
    return dataclasses.replace(
        golden(dtype),
        loss=curve.loss,
        grad_norm=curve.grad_norm,
        data_order=curve.data_order,
        initial_weights=weights_hash(initial_weights(config(dtype))),
    )


@functools.cache
def unchanged(dtype: Dtype) -> Trace:
    """Returns what today's reference trains to, trained once."""
    return trained(dtype)


@contextmanager
def changed(op: Op, reference: Callable[..., Any]) -> Iterator[None]:
    """Replaces the op's reference, as an edit of its source would."""
    before = op.reference
    object.__setattr__(op, "reference", reference)
    try:
        yield
    finally:
        object.__setattr__(op, "reference", before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_still_trains_to_the_golden_curve(dtype: Dtype) -> None:
    pair = align.compare(golden(dtype), unchanged(dtype))
    assert pair.verdict == "aligned", pair.reasons


def test_a_full_record_compares_too() -> None:
    """Teacher forcing included."""
    found = align.record(
        config("float32"), "reference", sampler=Text, controls=0, capture_steps=[2, 12]
    )
    pair = align.compare(golden("float32"), found)
    assert pair.verdict == "aligned", pair.reasons
    assert pair.max_gradient_ratio > 0


SCALAR = {
    "ATEN_CPU_CAPABILITY": "default",
    "DNNL_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "2",
}


def test_another_instruction_set_is_aligned_and_not_the_same_bits() -> None:
    """The same weights and data with another rounding: torch without its vector code, oneDNN and
    MKL at their oldest, another number of threads."""
    code = f"""
import json, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_golden
for dtype in {DTYPES!r}:
    t = test_golden.trained(dtype)
    print(json.dumps([dtype, t.loss.tolist(), t.initial_weights, t.data_order]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **SCALAR},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    for dtype, loss, weights, order in map(json.loads, done.stdout.splitlines()):
        there = dataclasses.replace(
            golden(dtype), loss=np.array(loss), initial_weights=weights, data_order=order
        )
        pair = align.compare(golden(dtype), there)
        assert pair.verdict == "aligned", (dtype, pair.reasons)
        if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
            assert loss != unchanged(dtype).loss.tolist(), dtype


def geglu_tanh(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * torch.nn.functional.gelu(gate, approximate="tanh")


def norm_eps(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *rest: float) -> Any:
    total = x + rest[1] * residual
    return torch.nn.functional.layer_norm(total, total.shape[-1:], weight, bias, 1e-4), total


def no_bias_correction(*args: Any) -> None:
    lists, (scale, _, lr, beta1, beta2, eps, decay, copies) = args[:4], args[4:]
    ADAMW(*lists, scale, 10**6, lr, beta1, beta2, eps, decay, copies)


ADAMW = ops.adamw.reference
PLANTED: dict[str, tuple[Op, Callable[..., Any]]] = {
    "tanh-gelu": (ops.geglu, geglu_tanh),
    "norm-eps": (ops.add_layer_norm, norm_eps),
    "adam-without-bias-correction": (ops.adamw, no_bias_correction),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_change_diverges(name: str) -> None:
    with changed(*PLANTED[name]):
        pair = align.compare(golden("float32"), trained("float32"))
    assert pair.verdict == "diverged"
    assert pair.max_envelope_ratio > 2


def test_golden_traces_are_small() -> None:
    assert {p.name for p in FOLDER.iterdir()} == {f"reference-{d}.trace" for d in DTYPES}
    for path in FOLDER.iterdir():
        assert path.stat().st_size < MAX_BYTES


if __name__ == "__main__":
    for dtype in DTYPES:
        trace = align.record(
            config(dtype), "reference", sampler=Text, controls=8, capture_steps=[2, 12]
        )
        trace.save(FOLDER / f"reference-{dtype}.trace")
