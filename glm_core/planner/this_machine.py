"""Predicts steps of our own trainer on this machine, from what every process reaches while all
work, and compares them with measured ones. Four factors are fitted to steps of single processes,
messages are timed by themselves; nothing is fitted to a step of a plan."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glm_core.config import ModelConfig
from glm_core.distributed.plan import Plan, parse, require_fit
from glm_core.errors import ConfigError
from glm_core.planner import cost
from glm_core.planner.efficiency import fit_bounded
from glm_core.planner.rank import Rank, count, planned_rank, rank_shapes
from glm_core.planner.rank_memory import activations
from glm_core.planner.rank_messages import messages

PARTS = ("matrix products", "loss", "elementwise", "optimizer", "calls")
PLANS = (
    "dp=2",
    "dp=2,micro_batches=2",
    "dp=2,zero=1",
    "dp=2,zero=3",
    "tp=2",
    "tp=2,sp=true",
    "pp=2,micro_batches=4",
)
"""the plans that are measured by default"""
SIDE = 1024
"""rows and columns of the square matrix product that measures the peak"""
READ = 256 << 20
"""bytes of the read that measures the memory's bandwidth"""
SIZES = tuple(4**k << 10 for k in range(8))
"""bytes of the messages that are timed: 1 KiB to 16 MiB"""
MESSAGES = {
    "all_reduce": "bfloat16",
    "sum": "float32",
    "all_gather": "bfloat16",
    "reduce_scatter": "float32",
    "p2p": "bfloat16",
}
"""what a bfloat16 step sends: the dtype; `sum` is the all-reduce of gradients"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepAlone:
    """A step of one process that talks to no other: on part of the model."""

    num_layers: int
    vocab: int
    batch: int
    """sequences"""

    @property
    def name(self) -> str:
        """The key of its times."""
        return f"alone {self.num_layers} layers, vocab {self.vocab}, batch {self.batch}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """A request to the processes: what they time, in bfloat16 on the backend `cpu`."""

    preset: str
    processes: int
    length: int
    """tokens of a sequence"""
    global_batch: int
    """sequences of a plan's step"""
    rounds: int
    plans: tuple[str, ...] = ()
    alone: tuple[StepAlone, ...] = ()
    messages: bool = False
    """also each of MESSAGES in each of SIZES"""


def steps_alone(model: ModelConfig) -> tuple[StepAlone, ...]:
    """Returns the single-process steps that tell the factors apart: they differ in layers,
    vocabulary and batch."""
    n, v = model.num_layers, model.vocab
    sizes = ((n, v, 4), (n, v, 2), (n, v, 1), (n // 2, v, 2), (n // 4, v, 4), (n // 2, v // 4, 4))
    return tuple(
        StepAlone(num_layers=max(1, layers), vocab=vocab, batch=batch)
        for layers, vocab, batch in sizes
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What every process reaches while all work."""

    peak: float
    """FLOP/s of a bfloat16 matrix product"""
    bandwidth: float
    """bytes/s read from memory"""
    messages: Mapping[str, Sequence[float]]
    """by MESSAGES: seconds of a message of each of SIZES"""
    factors: tuple[float, ...] = (1.0,) * len(PARTS)
    """by PARTS: real seconds for each nominal second; for calls, seconds for each pass of a
    layer"""

    def seconds(self, rank: Rank) -> dict[str, float]:
        """Returns the seconds of a rank's step by part, messages included. Time spent waiting for
        other ranks is left out."""
        m = rank.plan.micro_batches
        real = [f * t for f, t in zip(self.factors, nominal(rank, self), strict=True)]
        parts = {k: s * (1 if k == "optimizer" else m) for k, s in zip(PARTS, real, strict=True)}
        parts["messages"] = sum(
            n * self.message("sum" if name == "all_reduce" and rank.plan.tp == 1 else name, size)
            for (name, size), n in messages(rank).items()
        )
        return parts

    def message(self, name: str, size: int) -> float:
        """Returns the seconds of one message of `size` bytes, interpolated between the timed sizes.
        A message to a neighbour counts where it is received; sending is 0."""
        if name == "send":
            return 0.0
        times = self.messages["p2p" if name == "recv" else name]
        if size > SIZES[-1]:
            return times[-1] * size / SIZES[-1]
        return float(np.interp(size, SIZES, times))


def nominal(rank: Rank, machine: Machine) -> tuple[float, ...]:
    """Returns the seconds of PARTS at the peak and at the bandwidth, of one micro-batch; of the
    optimizer for the whole step, and for calls the number of passes of a layer."""
    p, work = rank.plan, cost.Work(model=rank.model, seq=rank.length)
    t, layers, passes = p.tp, sum(rank.layers), 4 if p.recompute == "full" else 3
    attention_passes = passes + (p.recompute == "selective")
    layer = passes * cost.layer_flops(work) + attention_passes * cost.attention_flops(work)
    head_passes = 3 if t == 1 else 4  # the tensor-parallel loss computes its logits twice
    head = head_passes * cost.head_flops(work) * rank.has_last_stage
    moved = 2.0 * passes * layers * activations(rank)
    # and reads and writes them in float32, 48 bytes a logit
    moved += 48.0 * rank.tokens * rank.model.vocab / t * rank.has_last_stage * (t > 1)
    shapes = rank_shapes(rank)
    updated = cost.OPTIMIZER_BYTES * count(shapes, p.dp if p.zero else 1)
    copied = 8.0 * count(shapes) if p.dp > 1 else 0.0  # in and out of messages
    return (
        rank.micro_batch * layers * layer / t / machine.peak,
        rank.micro_batch * head / t / machine.peak,
        moved / machine.bandwidth,
        (updated + copied) / machine.bandwidth,
        float(layers * passes),
    )


def calibrated(times: Mapping[str, Sequence[float]], model: ModelConfig, length: int) -> Machine:
    """Returns the machine that explains the times of `bench.plan_steps`. The fastest round counts,
    since other processes can only add. The factors are least squares of the relative error over the
    single-process steps, none negative. Elementwise work is taken at the bandwidth: in steps of one
    width it grows as products do, so its factor could not be told from theirs."""
    best = {k: min(v) for k, v in times.items()}
    machine = Machine(
        peak=2.0 * SIDE**3 / best["gemm bfloat16"],
        bandwidth=READ / best["memory read"],
        messages={k: [best[f"{k} {size}"] for size in SIZES] for k in MESSAGES},
    )
    alone = steps_alone(model)
    table = [nominal(_rank_alone(model, a, length), machine) for a in alone]
    seconds = np.array([best[a.name] for a in alone])
    relative = np.array(table) / seconds[:, None]
    fixed = PARTS.index("elementwise")
    free = np.delete(relative, fixed, axis=1)
    factors = fit_bounded(free, 1.0 - relative[:, fixed], np.zeros(len(PARTS) - 1))
    return dataclasses.replace(machine, factors=(*factors[:fixed], 1.0, *factors[fixed:]))


def _rank_alone(model: ModelConfig, step: StepAlone, length: int) -> Rank:
    part = dataclasses.replace(model, num_layers=step.num_layers, vocab=step.vocab)
    return Rank(model=part, plan=Plan(), pp_rank=0, length=length, micro_batch=step.batch)


def predicted(
    machine: Machine, model: ModelConfig, plan: Plan, length: int, global_batch: int
) -> dict[str, float]:
    """Returns the seconds of a step by part. The slowest stage does all its micro-batches; the
    bubble is one micro-batch of every other stage."""
    stages = [
        planned_rank(model, plan, stage * plan.tp * plan.dp, length, global_batch)
        for stage in range(plan.pp)
    ]
    parts = [machine.seconds(rank) for rank in stages]
    totals = [sum(p.values()) for p in parts]
    slowest = totals.index(max(totals))
    m = plan.micro_batches
    bubble = sum((total - p["optimizer"]) / m for total, p in zip(totals, parts, strict=True))
    bubble -= (totals[slowest] - parts[slowest]["optimizer"]) / m
    return parts[slowest] | {"bubble": bubble}


def write_cluster(path: str, machine: Machine, facts: Mapping[str, Any], processes: int) -> None:
    """Writes the machine as a file for `glm-core plan --cluster`; memory and power are the
    preset's. `facts` are those of `measure.timing.machine`. Raises ConfigError where it cannot be
    written."""
    read = machine.bandwidth / 1e9
    reduced = SIZES[-1] / machine.messages["all_reduce"][-1] / 1e9
    link = f"{min(reduced, read):.4g} GB/s"
    fields = {
        "chip": "CPU",
        "name": "here",
        "chips": processes,
        "chips_per_node": processes,
        "peak": f"{machine.peak / 1e9:.4g} GFLOPS",
        "memory_bandwidth": f"{read:.4g} GB/s",
        "link_within_node": link,
        "link_between_nodes": link,
        "source": f"measured by glm-core plan measure on {processes} processes of "
        f"{facts['cpu']}, one thread each, all at once; memory and power assumed",
    }
    try:
        Path(path).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {path}: {error.strerror}; name another file") from error


def checked_plans(texts: Sequence[str], model: ModelConfig, timings: Timings) -> dict[str, Plan]:
    """Returns the plans by their text. Raises ConfigError where one cannot be run."""
    plans = {text: parse(text) for text in texts}
    for plan in plans.values():
        require_fit(
            plan,
            model,
            world=timings.processes,
            global_batch=timings.global_batch,
            length=timings.length,
        )
    return plans


def report(
    machine: Machine,
    forecast: Mapping[str, Mapping[str, float]],
    before: Mapping[str, Sequence[float]],
    during: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Compares predicted with measured steps, by the fastest round. `before` holds the times that
    the machine was calibrated by, `during` those taken with the plans. The drift is how many times
    as long single-process steps took during the measurement as before it."""
    drift = statistics.median(
        min(times) / min(before[name]) for name, times in during.items() if name.startswith("alone")
    )
    rows: list[dict[str, Any]] = []
    for plan, parts in forecast.items():
        seconds, measured = sum(parts.values()), min(during[plan])
        rows.append(
            {
                "plan": plan,
                "predicted_step_s": seconds,
                "measured_step_s": measured,
                "error": seconds / measured - 1,
                "error_without_drift": seconds * drift / measured - 1,
                "parts_s": dict(parts),
                "rounds_s": list(during[plan]),
            }
        )

    def median_error(field: str) -> float:
        return statistics.median(abs(row[field]) for row in rows)

    return {
        "rows": rows,
        "drift": drift,
        "peak_gflops": machine.peak / 1e9,
        "read_gb_s": machine.bandwidth / 1e9,
        "factors": dict(zip(PARTS, machine.factors, strict=True)),
        "median_abs_error": median_error("error"),
        "median_abs_error_without_drift": median_error("error_without_drift"),
        "alone_s": {name: min(v) for name, v in before.items() if name.startswith("alone")},
        "messages_s": dict(machine.messages),
    }
