"""Computes the calls of a record again on this machine, and judges what both machines computed:
which operators differ beyond honest rounding, and on which side."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from glm_core.align.replay import LOW
from glm_core.verdict import oracle, references
from glm_core.verdict.calls import Recorded
from glm_core.verdict.comparison import HERE, THERE, Comparison
from glm_core.verdict.docket import Docket
from glm_core.verdict.judge import Judgement, judge
from glm_core.verdict.oracle import Results
from glm_core.verdict.record import Record
from glm_core.verdict.report import Unjudged

Sides = dict[str, Docket]


def compare(record: Record, device: str, rate: float) -> Comparison:
    """Judges the calls of a record against those that this machine computes of the same arguments
    on `device`."""
    dockets = {HERE: Docket(rate / 2), THERE: Docket(rate / 2)}
    equal = total = 0
    left_out: dict[tuple[str, str], int] = {(n, f"there: {w}"): c for n, w, c in record.left_out}
    for name, there in record.calls:
        try:
            if there is None:
                raise NotImplementedError(f"torch {torch.__version__} does not have it")
            here = again(there, device)
            same = _equal(here, there.results)
            sides = {HERE: here} if same else {HERE: here, THERE: there.results}
            _judge(there, device, sides, dockets)
        except (RuntimeError, TypeError, ValueError, IndexError, MemoryError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            key = (name, reason if reason == ROUNDS else f"not computed on {device}: {reason:.100}")
            left_out[key] = left_out.get(key, 0) + 1
            continue
        total, equal = total + 1, equal + same
    findings = {side: docket.findings(docket.rate) for side, docket in dockets.items()}
    return Comparison(
        record=record.path,
        program=record.report.program,
        devices=record.report.devices,
        torch=record.report.torch,
        steps=record.report.steps,
        here=device,
        calls=total,
        equal=equal,
        only_there=sorted(
            {f.operator for f in record.report.findings} - {f.operator for f in findings[THERE]}
        ),
        findings=findings,
        not_compared=[
            Unjudged(operator=name, calls=count, flops_share=0.0, reason=reason)
            for (name, reason), count in left_out.items()
        ],
        num_tests=sum(d.num_tests for d in dockets.values()),
    )


def again(there: Recorded, device: str) -> Results:
    """Computes a recorded call with this machine's kernel. What the program has active, such as a
    library that replaces operators, is active here too."""
    func = there.call.func
    written = oracle.written(func)

    def moved(x: Any) -> Any:
        if isinstance(x, torch.device):
            return torch.device(device)
        return x.to(device, copy=bool(written)) if isinstance(x, Tensor) else x

    args, kwargs = tree_map(moved, there.call.args), tree_map(moved, there.call.kwargs)
    with torch.no_grad():
        return oracle.results(func, args, kwargs, func(*args, **kwargs))


def _equal(here: Results, there: Results) -> bool:
    return here.keys() == there.keys() and all(
        x.shape == there[n].shape and x.dtype == there[n].dtype and torch.equal(x, there[n])
        for n, x in here.items()
    )


def _judge(there: Recorded, device: str, sides: dict[str, Results], dockets: Sides) -> None:
    """Judges the results of each side by the host's float64; equal ones once, for both sides. A
    kernel of another machine is not the host's own: that one may show an honest way."""
    name = there.call.func._schema.name
    judged: Judgement | None = None
    with oracle.alone():
        for side, docket in dockets.items():
            if side in sides or judged is None:
                kind = device.partition(":")[0] if side == HERE else "another machine"
                call = dataclasses.replace(there.call, device_type=kind)
                judged = judge(call, sides[side], docket.least_z)
                if side == THERE and judged.outside and _rounds_there(there):
                    raise NotImplementedError(ROUNDS)
            docket.add(name, there.place, there.step, judged, 0.0)


ROUNDS = "a CPU's kernel rounds inside, and another CPU's does not show how; judged there"


def _rounds_there(there: Recorded) -> bool:
    """Says whether the kernel there is one of a CPU that may round inside to less than float32."""
    low = any(y.dtype in LOW for y in there.results.values())
    name = there.call.func._schema.name
    return low and there.call.device_type == "cpu" and name in references.HOST_ROUNDS
