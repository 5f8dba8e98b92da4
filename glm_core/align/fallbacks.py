"""Lists what did not run on the device's own kernels, and the share of a step that it costs:
references in a kernel's place, and operators that the vendor's runtime sends to the host unseen by
our dispatch."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from glm_core import config as c
from glm_core import dispatch, ops
from glm_core.align.capture import Call, capture, copied
from glm_core.align.trace import Trace
from glm_core.align.training import Run
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.dispatch import Op
from glm_core.errors import TraceError
from glm_core.model.glm import GLM
from glm_core.spec import Cost
from glm_core.training.batches import Sampler

ROUNDS = 5
"""each call is timed so often; the median counts"""
OUTSIDE = "(outside ops)"
"""what torch does between the ops: it accumulates gradients, copies, and sums losses"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The fallbacks of one op for one reason."""

    op: str
    where: str
    """`reference`: torch's own operators on the backend's device; `host`: the runtime's choice"""
    reason: str
    calls: float
    """calls per step"""
    flops_share: float | None = None
    """share (0 to 1) of the FLOPs of a step's op calls, forward and backward, by the ops' own
    costs; None outside ops"""
    time_share: float | None = None
    """share (0 to 1) of the time of a step's op calls, each timed alone, forward and backward; None
    where not measured"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fallbacks:
    """All fallbacks of one backend in a step."""

    backend: str
    rows: list[Row]
    """the largest share of FLOPs first"""
    runtime_counted: bool
    """whether calls on the host would be listed: the runtime counts them, or the device is the
    CPU"""
    ops_ms: float | None = None
    """time of all op calls of a step, each timed alone; None where not measured"""
    step_ms: float | None = None
    """time of a whole step; None where not measured"""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """Calls of a step that differ in nothing but their values."""

    calls: list[Call]
    flops: int
    """FLOPs of all the calls"""
    seconds: float
    """time of one call"""
    host: Counter[str]
    """operators that the runtime sends to the host during one call"""


def measure(config: c.RunConfig, sampler: Sampler, backend: str | Backend) -> Fallbacks:
    """Trains three steps and measures their fallbacks. The first step warms up. The second is timed
    and its operators on the host are counted. The op calls of the third are captured and then timed
    one by one."""
    run = Run(config, sampler, backend)
    with registry.use(run.backend, exact=run.config.train.exact):
        run.step()
        before, begin = host_calls(run.backend), time.perf_counter()
        run.step()
        run.backend.synchronize()
        seconds, outside = time.perf_counter() - begin, host_calls(run.backend) - before
        with capture(run.model, step=3) as captured:
            run.step()
        kinds = [time_calls(calls, run.backend) for calls in group_alike(captured.calls)]
    for kind in kinds:
        outside.subtract({name: n * len(kind.calls) for name, n in kind.host.items()})
    outside_ops = [
        Row(op=OUTSIDE, where="host", reason=f"the runtime sent {name} there", calls=n)
        for name, n in (+outside).items()
    ]
    return Fallbacks(
        backend=run.backend.name,
        rows=sorted([*rows(kinds, run.backend), *outside_ops], key=sort_key),
        runtime_counted=run.device.type == "cpu" or run.backend.runtime_fallbacks() is not None,
        step_ms=seconds * 1e3,
        ops_ms=sum(k.seconds * len(k.calls) for k in kinds) * 1e3,
    )


def sort_key(row: Row) -> tuple[float, str]:
    """Sort key: the largest share of FLOPs first, rows outside ops last."""
    return (1.0 if row.flops_share is None else -row.flops_share), row.op + row.reason


def host_calls(backend: Backend) -> Counter[str]:
    """Returns how often the runtime has sent each operator to the host so far; empty where the
    runtime does not count."""
    return Counter(backend.runtime_fallbacks() or {})


def group_alike(calls: Iterable[Call]) -> Iterator[list[Call]]:
    """Groups calls with the same op, shapes, strides, dtypes and constants."""

    def facts(x: Any) -> Any:
        return (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x

    groups: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        groups[f"{call.op.name} {tree_map(facts, call.args)}"].append(call)
    yield from groups.values()


def time_calls(calls: list[Call], backend: Backend) -> Kind:
    """Times the first of these calls, forward and backward, for all of them."""
    call = calls[0]
    args = tree_map(copied, call.args)
    wanted = [args[n] for n in call.op.differentiable if isinstance(args.get(n), Tensor)]
    gradients = [g for g in call.output_gradients if g is not None]
    for x in wanted if gradients else []:
        x.requires_grad_()

    def once() -> None:
        with torch.set_grad_enabled(bool(gradients)):
            out = call.op(**args)
        if gradients:
            results = out if isinstance(out, tuple) else (out,)
            pairs = zip(results, call.output_gradients, strict=True)
            used = [y for y, g in pairs if g is not None]
            torch.autograd.grad(used, wanted, gradients, allow_unused=True)
        backend.synchronize()

    once()
    before = host_calls(backend)
    once()
    host, seconds = host_calls(backend) - before, []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - begin)
    flops = sum(num_flops(x.op.cost(**x.args), bool(x.output_gradients)) for x in calls)
    return Kind(calls, flops, statistics.median(seconds), host)


def num_flops(cost: Cost, differentiated: bool) -> int:
    """Returns the FLOPs of a call: forward, and backward where there was one."""
    return cost.flops + (cost.backward_flops if differentiated else 0)


def rows(kinds: list[Kind], backend: Backend) -> list[Row]:
    """Returns one row per op, place and reason. Calls that ran on the device's kernels have
    none."""
    flops = sum(k.flops for k in kinds) or 1
    seconds = sum(k.seconds * len(k.calls) for k in kinds)
    sums: dict[tuple[str, str, str], list[Kind]] = defaultdict(list)
    for kind in kinds:
        call = kind.calls[0]
        support = backend.support(call.op, call.args)
        if not support.ok:
            sums[call.op.name, "reference", support.reason].append(kind)
        for name, n in kind.host.items():
            reason = f"the runtime sent {name} there, {n} times per call"
            sums[call.op.name, "host", reason].append(kind)
    return [
        Row(
            op=op,
            where=where,
            reason=reason,
            calls=sum(len(k.calls) for k in group),
            flops_share=sum(k.flops for k in group) / flops,
            time_share=sum(k.seconds * len(k.calls) for k in group) / seconds,
        )
        for (op, where, reason), group in sums.items()
    ]


def recorded(trace: Trace) -> Fallbacks:
    """Returns the fallbacks in a trace, as shares of the FLOPs of a step of its config. All calls
    of an op count alike. A trace holds no times, and no calls that the runtime sent to the host.
    Raises TraceError for a config that cannot be the trace's."""
    config = c.from_dict(c.RunConfig, trace.config)
    steps = max(1, trace.loss.size)
    try:
        if config.model.num_layers > len(trace.parameters):
            raise ValueError("more layers than parameters")
        table = step_flops(config)
    except (ValueError, RuntimeError, OverflowError) as error:
        raise TraceError(
            f"trace of {trace.backend!r}: its config is impossible ({error}); record the run again"
        ) from None
    total = sum(flops for _, flops in table.values())
    rows = []
    for row in trace.fallbacks:
        op, calls = row["op"], row["count"] / steps
        step_calls, flops = table.get(op, (1, 0))
        share = calls / step_calls * flops / total
        rows.append(
            Row(op=op, where="reference", reason=row["reason"], calls=calls, flops_share=share)
        )
    return Fallbacks(
        backend=trace.backend,
        rows=sorted(rows, key=sort_key),
        runtime_counted=trace.environment.get("device_type") == "cpu",
    )


def step_flops(config: c.RunConfig) -> dict[str, tuple[int, int]]:
    """Returns by op the number of calls in a step and their FLOPs, from shapes alone; attention
    counts all pairs."""
    table: dict[str, tuple[int, int]] = {}

    def count(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls, flops = table.get(op.name, (0, 0))
        cost = op.cost(*args, **kwargs)
        table[op.name] = calls + 1, flops + num_flops(cost, bool(op.differentiable))
        return dispatch.run(op, args, kwargs)

    t, size = config.train, (config.train.micro_batch, config.data.length)
    with torch.device("meta"), torch.no_grad(), registry.use("null"), dispatch.intercept(count):
        model = GLM(config.model).to(getattr(torch, t.dtype))
        ids = torch.empty(size, dtype=torch.int64)
        positions = torch.empty(size[0], 2, size[1], dtype=torch.int64)
        model.loss(ids, positions, ids.int(), ids.int(), ids, ids.float())
    micro_batches = t.global_batch // t.micro_batch
    table = {op: (micro_batches * n, micro_batches * flops) for op, (n, flops) in table.items()}
    params = [p.detach() for p in model.parameters()]
    table["global_norm"] = 1, ops.global_norm.cost(params).flops
    table["adamw"] = 2, ops.adamw.cost(params, params, params, params, params[0], 1, t.lr).flops
    return table
