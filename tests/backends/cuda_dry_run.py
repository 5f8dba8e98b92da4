"""Runs whole training and decode steps of the cuda backend on fake tensors, in a process whose
torch sees a CUDA device (LD_PRELOAD of csrc/tests/fake_cuda.cpp): `python cuda_dry_run.py
BACKEND:DTYPE[:STRAY] ...` prints, for each, the operators that each model of the family called, or
the error that ended its run."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from glm_core import dispatch
from glm_core.backends import registry
from glm_core.backends.cuda import attention, experts
from glm_core.backends.cuda.decode_ops import Step, inputs, packed
from glm_core.backends.cuda.kernels import share
from glm_core.config import TrainConfig
from glm_core.decode_step import Rows, Stack
from glm_core.errors import UnsupportedOpError
from glm_core.model.glm import GLM, Router
from glm_core.model.presets import preset
from glm_core.model.stack import angles, stack
from glm_core.training.optimizer import Optimizer

B, L = 2, 32
SIZES: dict[str, Any] = {"num_layers": 2, "vocab": 512, "max_length": 64}
SMALL = {"glm-4.7-flash": {"num_experts": 8}}
"""preset with experts -> what is smaller in it"""
INPUTS: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "tokens": (torch.int64, (B, L)),
    "positions": (torch.int64, (B, 2, L)),
    "key_start": (torch.int32, (B, L)),
    "key_end": (torch.int32, (B, L)),
    "labels": (torch.int64, (B, L)),
    "token_weight": (torch.float32, (B, L)),
}


def train(name: str, dtype: str, stray: str) -> list[str]:
    """Runs one optimizer step: two micro-batches forward and backward, norm, clip, AdamW. `stray`
    names an input that stays on the host. Returns the parameters whose gradient is wrong."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device("cuda"):  # .to() cannot move fake parameters
        model = GLM(preset(name, **SIZES, **SMALL.get(name, {})))
    torch.set_default_dtype(before)
    for router in (m for m in model.modules() if isinstance(m, Router)):
        router.bias = torch.nn.Parameter(router.bias.float(), requires_grad=False)
    optimizer = Optimizer(model, TrainConfig(dtype=dtype))
    inputs = {
        k: torch.zeros(shape, dtype=t, device="cpu" if k == stray else "cuda")
        for k, (t, shape) in INPUTS.items()
    }
    for _ in range(2):
        model.loss(**inputs).backward()
    with mock.patch("torch.isfinite", return_value=True):  # a fake tensor has no value to ask
        optimizer.step(1e-3)
    wrong = [
        n
        for n, p in model.named_parameters()
        if not n.endswith("router.bias")  # no gradient reaches it
        and (p.grad is None or (p.grad.dtype, p.grad.device) != (p.dtype, p.device))
    ]
    if name in SMALL:
        return wrong  # a layer of experts has no recorded steps yet
    logits = decode(model)
    return wrong + ["logits"] * ((logits.dtype, logits.device.type) != (torch.float32, "cuda"))


def decode(model: GLM) -> torch.Tensor:
    """Runs a decode step of two sequences, as it is recorded."""
    c, parts = model.config, stack(model, lambda: angles(model, model.config.max_length))
    assert isinstance(parts, Stack)
    shape = (c.num_layers, 2, 3, c.num_kv_heads, c.max_length, c.head_dim)
    cache = torch.zeros(shape, dtype=model.embedding.dtype, device="cuda")
    rows = Rows([5, 6], [3, 0, 7, 1], [0, 0], [4, 8], [3, 7])
    with torch.no_grad():
        return Step(parts)(inputs(packed(rows).to("cuda")), cache)


FAMILY = ("glm-base", "glm-130b", "chatglm-6b", "chatglm2-6b", "glm-4-9b", "glm-4.7-flash")


def family(backend: str, dtype: str, stray: str = "") -> dict[str, Any]:
    """Runs in strict mode: an op without a kernel for its arguments raises the reason."""
    chosen = registry.get(backend)
    share(chosen)  # as if the kernels were built: nothing is computed
    answer = {}
    for name in FAMILY:
        counted: Counter[str] = Counter()

        def count(op: dispatch.Op, args: Any, kwargs: Any, counted: Counter[str] = counted) -> Any:
            counted[op.name] += 1
            return dispatch.run(op, args, kwargs)

        use = registry.use(chosen, strict=True)
        with FakeTensorMode(), use, dispatch.intercept(count):
            wrong = train(name, dtype, stray)
        answer[name] = {"ops": counted, "wrong": wrong}
    return answer


def main(*runs: str) -> None:
    attention.HAS_TRITON = experts.HAS_TRITON = True
    answers: dict[str, Any] = {}
    for run in runs:
        try:
            answers[run] = family(*run.split(":"))
        except UnsupportedOpError as error:
            answers[run] = str(error)
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
