"""Dry-runs the ascend backend with the real torch_npu, in the environment of `setup_npu.sh`; prints
one JSON object. No arithmetic happens: tensors are fake, on device npu:0, shapes and dtypes come
from torch_npu's own meta kernels, calls are checked by its own schemas.

A tensor on the host in any operator's arguments or results is an error."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch_npu
from torch import Tensor, distributed  # noqa: TID251  # which collectives torch_npu registers
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glm_core import ops
from glm_core.backends import registry
from glm_core.config import TrainConfig
from glm_core.conformance.case import Case, select
from glm_core.conformance.oracle import forward, leaf, tensors_by_name
from glm_core.model.glm import GLM
from glm_core.model.presets import preset
from glm_core.training.optimizer import Optimizer

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))
import npu_model

NPU = torch.device("npu:0")
BACKEND = registry.get("ascend")


class HostTensor(Exception):
    """A tensor was on the host where it must be on the device."""


class Watch(TorchDispatchMode):
    """A mode that counts the calls of torch_npu's operators and raises HostTensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "npu":
            self.calls[func._schema.name.partition("::")[2]] += 1
        for t in tree_leaves((args, kwargs, out)):
            if isinstance(t, Tensor) and t.device.type != "npu":
                raise HostTensor(f"{func}: a tensor on {t.device}, shape {tuple(t.shape)}")
        return out


def outcome(run: Callable[[], Any]) -> str:
    """Returns what went wrong in one line, '' where nothing did."""
    try:
        run()
    except Exception as error:  # whatever torch_npu raises is the finding
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def differing_schemas() -> list[str]:
    """Returns the schemas of the by-value model that differ from the wheel's."""
    found = []
    for schema in npu_model.schemas():
        name, _, overload = schema.partition("(")[0].partition(".")
        real = str(getattr(getattr(torch.ops.npu, name), overload or "default")._schema)
        if real != f"npu::{schema}":
            found.append(f"{real} modelled as {schema}")
    return found


def _geglu_grad(dy: Tensor, x: Tensor, gelu: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _add_layer_norm_grad(
    dy: Tensor | None, x1: Tensor, x2: Tensor, rstd: Tensor, mean: Tensor, gamma: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    wide = torch.empty_like(gamma, dtype=torch.float32)
    return torch.empty_like(x1), torch.empty_like(x1), wide, wide.clone()


def _int4pack(codes: Tensor, *_: Any) -> Tensor:
    return codes.new_empty((codes.shape[0], codes.shape[1] // 8))


Repair = tuple[str, Callable[..., Any], str]
REPAIRS: dict[str, Repair] = {
    "npu_geglu_grad": (
        "geglu-float32-2x5x48-grad",
        _geglu_grad,
        "its meta kernel returns two tensors, not one",
    ),
    "npu_add_layer_norm_backward": (
        "add_layer_norm-float32-2x5x96-grad",
        _add_layer_norm_grad,
        "no meta kernel",
    ),
    "npu_convert_weight_to_int4pack": (
        "quantized_linear-float16-2x5x96-64-int4-test",
        _int4pack,
        "no meta kernel",
    ),
}
"""operator: (case that needs it, meta kernel of ours, what torch_npu 2.13.0 lacks)"""


def repair() -> dict[str, str]:
    """Gives torch_npu the meta kernels that it lacks; tells for each how its case failed
    before."""
    library = torch.library.Library("npu", "IMPL", "Meta")
    failed = {}
    for operator, (id, meta, _) in REPAIRS.items():
        [case] = select(BACKEND, id=id)
        failed[operator] = outcome(lambda case=case: watched(case, case.sample.make(case.dtype)))
        library.impl(operator, meta, "Meta", allow_override=True)
    KEPT.append(library)
    return failed


def results(case: Case, function: Callable[..., Any], args: dict[str, Any]) -> dict[str, Tensor]:
    """Returns outputs and mutated arguments, or gradients of all outputs, by name."""
    if case.mode == "test":
        with torch.no_grad():
            return forward(case.op, function, args)
    leaves: dict[str, Tensor] = {}
    args = {k: leaf(k, v, leaves) if k in case.op.differentiable else v for k, v in args.items()}
    outputs = list(tensors_by_name("out", function(**args)).values())
    drawn = [torch.ones_like(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), drawn)
    return dict(zip(leaves, gradients, strict=True))


def watched(case: Case, made: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the backend's results on the fake device, for arguments made on the host: to make
    fake ones would take ten times as long."""
    with FakeTensorMode(), registry.use(BACKEND, strict=True):
        args = _on_the_device(made)
        with Watch() as watch:
            found = results(case, case.op, args)
    COUNTED.update(watch.calls)
    return found


def _on_the_device(arguments: dict[str, Any], device: torch.device = NPU) -> dict[str, Any]:
    return {k: _on_device(v, device) for k, v in arguments.items()}


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_on_device(v, device) for v in value]
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


COUNTED: Counter[str] = Counter()
KEPT: list[torch.library.Library] = []
CODES = (ops.quantized_linear, ops.quantized_grouped_linear)


def _asked(case: Case) -> bool:
    """A schema and a meta kernel take every dtype alike: all samples are asked in bfloat16, an op's
    first one in float32 too, and in float16 only codes are."""
    if case.dtype == torch.bfloat16:
        return True
    return (
        case.dtype == torch.float16
        if case.op in CODES
        else (case.dtype == torch.float32 and case.mode == "test" and case.plain)
    )


CASES = [
    c
    for c in select(BACKEND, modes=("test", "grad"))
    if _asked(c)
    and not c.raises
    and (c.op.name, c.sample.id) != ("global_norm", "none")  # has no device
]


def check(case: Case) -> str:
    """Checks that shapes and dtypes are the reference's, which runs on tensors without values, a
    tenth of the work of fake ones, and that results are on the device; unsupported cases say so."""
    made = case.sample.make(case.dtype)
    with FakeTensorMode():
        support = BACKEND.support(case.op, _on_the_device(made))
    if not support.ok:
        return f"unsupported: {support.reason}"
    want = results(case, case.op.reference, _on_the_device(made, torch.device("meta")))
    expected = {k: (tuple(t.shape), t.dtype, NPU.type) for k, t in want.items()}
    got = {k: (tuple(t.shape), t.dtype, t.device.type) for k, t in watched(case, made).items()}
    return "" if got == expected else f"differs: {[expected, got]}"


@contextmanager
def _new_tensors(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with NPU:
            yield
    finally:
        torch.set_default_dtype(before)


def train(name: str, dtype: str, stray: str = "") -> dict[str, Any]:
    """Runs one optimizer step of a small model of the family: two micro-batches forward and
    backward, norm, clip, AdamW. `stray` names an input that stays on the host."""
    config = preset(name, num_layers=2, vocab=512, max_length=64)
    with FakeTensorMode(), registry.use(BACKEND, strict=True) as session:
        with _new_tensors(getattr(torch, dtype)):
            model = GLM(config)
        optimizer = Optimizer(model, TrainConfig(dtype=dtype))
        inputs = _batch(2, 32, stray)
        with Watch() as watch, mock.patch("torch.isfinite", return_value=True):
            for _ in range(2):
                model.loss(**inputs).backward()
            optimizer.step(1e-3)
    wrong = [n for n, p in model.named_parameters() if p.grad is None or p.grad.dtype != p.dtype]
    return {
        "calls": dict(watch.calls),
        "wrong": wrong,
        "fallbacks": len(session.fallbacks),
        "gradients": len(list(model.parameters())),
    }


INPUTS: dict[str, tuple[int, torch.dtype]] = {
    "tokens": (0, torch.int64),
    "positions": (2, torch.int64),
    "key_start": (0, torch.int32),
    "key_end": (0, torch.int32),
    "labels": (0, torch.int64),
    "token_weight": (0, torch.float32),
}
"""of GLM.loss: rows between batch and sequence, dtype"""


def _batch(b: int, n: int, stray: str) -> dict[str, Tensor]:
    made = {}
    for name, (rows, dtype) in INPUTS.items():
        shape = (b, rows, n) if rows else (b, n)
        made[name] = torch.zeros(shape, dtype=dtype, device="cpu" if name == stray else NPU)
    return made


STEPS = [
    *((name, "bfloat16") for name in ("tiny", "glm-base", "chatglm-6b", "glm4-34m")),
    ("glm-4-0414-9b", "float16"),
    ("glm-4-0414-9b", "float32"),
]


def device_calls() -> dict[str, Any]:
    """Calls what the backend needs from the device besides kernels, over the stubs."""
    BACKEND.synchronize()
    before = BACKEND.rng_state()
    torch.manual_seed(5)
    moved = not torch.equal(before, BACKEND.rng_state())
    BACKEND.set_rng_state(before)
    peak = BACKEND.peak(torch.bfloat16)
    return {
        "device": str(BACKEND.device()),
        "peak_bytes": BACKEND.memory_peak_bytes(),
        "rng": moved and torch.equal(before, BACKEND.rng_state()),
        "tflops": peak and peak.tflops,
        "probe": BACKEND.probe().reason,
        "collectives": list(distributed.Backend.backend_list),
    }


def main() -> None:
    """Prints everything as JSON."""
    failed_before = repair()
    cases = {case.id: _judged(case) for case in CASES}
    steps = {f"{name}-{dtype}": _step(name, dtype) for name, dtype in STEPS}
    strays = {k: outcome(lambda k=k: train("tiny", "float32", stray=k)) for k in INPUTS}
    json.dump(
        {
            "torch_npu": torch_npu.__version__,
            "torch": torch.__version__,
            "chip": torch_npu.npu.get_device_name(0),
            "schemas": differing_schemas(),
            "repaired": {k: {"before": v, "why": REPAIRS[k][2]} for k, v in failed_before.items()},
            "cases": cases,
            "calls": dict(COUNTED),
            "steps": steps,
            "strays": strays,
            "ops": sorted(ops.all_ops()),
            "device": device_calls(),
        },
        sys.stdout,
    )


def _judged(case: Case) -> str:
    found: list[str] = []
    return outcome(lambda: found.append(check(case))) or found[0]


def _step(name: str, dtype: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    error = outcome(lambda: found.append(train(name, dtype)))
    return found[0] if found else {"error": error}


if __name__ == "__main__":
    main()
