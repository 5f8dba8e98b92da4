"""Records the op calls of a training step into a witness file, and judges them again without the
device that computed them."""

from __future__ import annotations

import dataclasses
from typing import Any, TypedDict

import torch
from torch import Tensor

from glm_core import ops
from glm_core.align import teacher_forcing, verdict
from glm_core.align.capture import Call
from glm_core.align.replay import Results, replay_on, with_change
from glm_core.align.training import Run, free_run
from glm_core.align.verdict import Finding
from glm_core.align.worst_tests import fair_tests
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.config import Dtype, RunConfig
from glm_core.conformance.oracle import tensors_by_name
from glm_core.conformance.witness import Witness
from glm_core.errors import WitnessError
from glm_core.training.batches import Sampler

STEP = 12
"""the step that is recorded: late enough for biases and moments not to be zero"""
SEQUENCES = 2
"""sequences in the recorded step"""
MAX_CALL_BYTES = 8 << 20
"""a call with more bytes is left out of the file"""


class CallRow(TypedDict):
    """One recorded call; its tensors are in the witness under its index."""

    index: int
    op: str
    layer: str
    step: int
    dtype: str
    """the run's working dtype"""
    scalars: dict[str, Any]
    """the arguments that are no tensors"""
    outputs: int
    """number of outputs that were differentiated; 0 where nothing was"""


def record_step(
    witness: Witness, config: RunConfig, dtype: Dtype, sampler: Sampler, backend: Backend
) -> list[str]:
    """Trains on the backend up to STEP and adds that step's op calls in the first and the last
    block and outside of blocks, as the backend computes them. Returns the names of the calls that
    are too large."""
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(
            config.train,
            dtype=dtype,
            steps=max(STEP, config.train.steps),
            micro_batch=SEQUENCES,
            global_batch=SEQUENCES,
            ramp_from=0,
        ),
    )
    left_out = []
    chosen = ("", "0", str(config.model.num_layers - 1))
    run = Run(config, sampler, backend)
    curve = free_run(run, (STEP,), last=STEP)
    with registry.use(backend, exact=run.config.train.exact):
        for call in (c for c in curve.calls if c.layer in chosen):
            if not add(witness, call, replay_on(call, backend), dtype):
                left_out.append(f"{call.op.name} {call.index}")
    return left_out


def add(witness: Witness, call: Call, results: Results, dtype: str) -> bool:
    """Adds a call with its results. Returns False, and adds nothing, where it is too large."""
    parts: dict[str, dict[str, Any]] = {
        "arg": call.args,
        "gradient": {str(i): g for i, g in enumerate(call.output_gradients)},
        "result": {n: y for n, y in results.items() if n != "change"},  # it follows from the rest
    }
    tensors = {
        f"call|{call.index}|{part}|{name}": t.detach().cpu().contiguous()
        for part, values in parts.items()
        for key, value in values.items()
        for name, t in tensors_by_name(key, value).items()
    }
    if sum(t.nbytes for t in tensors.values()) > MAX_CALL_BYTES:
        return False
    witness.tensors |= {name: t.clone() for name, t in tensors.items()}
    plain = {n: v for n, v in call.args.items() if not tensors_by_name(n, v)}
    row = CallRow(
        index=call.index,
        op=call.op.name,
        layer=call.layer,
        step=call.step,
        dtype=dtype,
        scalars=plain,
        outputs=len(call.output_gradients),
    )
    witness.calls.append(dict(row))
    return True


def recorded(witness: Witness) -> list[tuple[Call, Results]]:
    """Returns the calls with the device's results. Raises WitnessError for a call that this
    glm_core cannot replay."""
    try:
        return [_call(witness.tensors, row) for row in witness.calls]
    except (KeyError, TypeError, AttributeError) as error:
        raise WitnessError(
            f"witness of {witness.backend}: a recorded call does not fit this glm_core's ops "
            f"({error!r}); judge it with the glm_core that wrote it, or record it again"
        ) from None


def _call(tensors: Results, row: dict[str, Any]) -> tuple[Call, Results]:
    parts: dict[str, dict[str, Tensor]] = {"arg": {}, "gradient": {}, "result": {}}
    prefix = f"call|{row['index']}|"
    for key, t in tensors.items():
        if key.startswith(prefix):
            part, _, name = key.removeprefix(prefix).partition("|")
            parts[part][name] = t
    op = ops.all_ops()[row["op"]]
    gradients = parts["gradient"]
    call = Call(
        op=op,
        index=row["index"],
        layer=row["layer"],
        step=row["step"],
        args=_with_lists(parts["arg"]) | row["scalars"],
        output_gradients=[gradients.get(str(i)) for i in range(row["outputs"])],
    )
    return call, with_change(call, parts["result"])


def _with_lists(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Turns `params[0]`, `params[1]`, ... back into one list."""
    args: dict[str, Any] = {}
    for i in range(len(tensors)):
        for name in [n for n in tensors if n.endswith(f"[{i}]")]:
            args.setdefault(name.rpartition("[")[0], []).append(tensors[name])
    return args | {n: t for n, t in tensors.items() if not n.endswith("]")}


def judge(witness: Witness, false_alarm_rate: float = verdict.FALSE_ALARM_RATE) -> list[Finding]:
    """Returns the outcome of every test of the recorded calls, the largest ratio first; those with
    a ratio above 1 are guilty. The share of the false-alarm rate is the one `compare` gives to the
    ops. Raises WitnessError."""
    by_dtype: dict[str, list[tuple[Call, Results]]] = {}
    for pair, row in zip(recorded(witness), witness.calls, strict=True):
        by_dtype.setdefault(row["dtype"], []).append(pair)
    found = [f for dtype, own in by_dtype.items() for f in _judge(own, dtype, false_alarm_rate)]
    return sorted(found, key=lambda f: -f.ratio)


def _judge(pairs: list[tuple[Call, Results]], dtype: str, rate: float) -> list[Finding]:
    results = {call.index: y for call, y in pairs}
    cases = list(teacher_forcing.cases(call for call, _ in pairs))
    limits = teacher_forcing.benign_limits(cases, getattr(torch, dtype))
    measured, _ = teacher_forcing.measure(cases, lambda call: results[call.index])
    tests, values = fair_tests(measured, cases, limits)
    return verdict.findings(tests, values, measured.count(), rate / verdict.NUM_TESTS)
