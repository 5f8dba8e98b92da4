"""Steps of our own trainer on this machine, predicted from what every process reaches at once and
then measured. Four factors come from steps of single processes, messages from their own times;
nothing is fitted to a step of a plan."""

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
from glm_core.planner import rank as own
from glm_core.planner.efficiency import fit_bounded
from glm_core.planner.rank import Job

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
SIDE = 1024
"""of the square matrix product that is the peak"""
READ = 256 << 20
"""bytes of the read that is the memory's bandwidth"""
SIZES = tuple(4**k << 10 for k in range(8))
"""bytes of the messages that are timed: 1 KiB to 16 MiB"""
MESSAGES = {
    "all_reduce": "bfloat16",
    "sum": "float32",
    "all_gather": "bfloat16",
    "reduce_scatter": "float32",
    "p2p": "bfloat16",
}
"""what a bfloat16 step sends, and in which dtype; a sum is the all-reduce of gradients"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepAlone:
    """A step of one process without the others: so much of the model, so many sequences."""

    num_layers: int
    vocab: int
    batch: int

    @property
    def name(self) -> str:
        return f"alone {self.num_layers} layers, vocab {self.vocab}, batch {self.batch}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """What the processes are to time, in bfloat16 on the backend `cpu`."""

    preset: str
    processes: int
    length: int
    global_batch: int
    rounds: int
    plans: tuple[str, ...] = ()
    alone: tuple[StepAlone, ...] = ()
    messages: bool = False


def steps_alone(model: ModelConfig) -> tuple[StepAlone, ...]:
    """Single-process steps that tell the factors apart: whole and part of the layers, of the
    vocabulary and of the batch."""
    n, v = model.num_layers, model.vocab
    sizes = ((n, v, 4), (n, v, 2), (n, v, 1), (n // 2, v, 2), (n // 4, v, 4), (n // 2, v // 4, 4))
    return tuple(StepAlone(num_layers=max(1, a), vocab=b, batch=c) for a, b, c in sizes)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What every process reaches while all work."""

    peak: float
    """FLOP/s of a bfloat16 matrix product"""
    bandwidth: float
    """bytes/s read"""
    messages: Mapping[str, Sequence[float]]
    """seconds of a message of each of SIZES"""
    factors: tuple[float, ...] = (1.0,) * len(PARTS)
    """seconds for each nominal second, by PARTS; of the last, seconds a layer's pass"""

    def seconds(self, job: Job) -> dict[str, float]:
        """Of one rank's step by part, messages included, waiting for others left out."""
        m = job.plan.micro_batches
        each = [f * t for f, t in zip(self.factors, nominal(job, self), strict=True)]
        found = {k: s * (1 if k == "optimizer" else m) for k, s in zip(PARTS, each, strict=True)}
        found["messages"] = sum(
            n * self.message("sum" if name == "all_reduce" and job.plan.tp == 1 else name, size)
            for (name, size), n in own.messages(job).items()
        )
        return found

    def message(self, name: str, size: int) -> float:
        """Seconds of one, between the sizes that were timed in proportion; what is sent to a
        neighbour counts where it is received."""
        if name == "send":
            return 0.0
        times = self.messages["p2p" if name == "recv" else name]
        if size > SIZES[-1]:
            return times[-1] * size / SIZES[-1]
        return float(np.interp(size, SIZES, times))


def nominal(job: Job, at: Machine) -> tuple[float, ...]:
    """PARTS of one micro-batch (of the optimizer: of the step) with products at the peak and bytes
    at the bandwidth. The shared vocabulary's loss computes its logits twice and writes them in
    float32; gradients and weights are copied in and out of messages."""
    p, work = job.plan, cost.Work(model=job.model, seq=job.length)
    t, layers, passes = p.tp, sum(job.layers), 4 if p.recompute == "full" else 3
    core = passes + (p.recompute == "selective")
    layer = passes * cost.layer_flops(work) + core * cost.attention_flops(work)
    head = (3 if t == 1 else 4) * cost.head_flops(work) * job.last
    moved = 2.0 * passes * layers * own.activations(job)
    moved += 48.0 * job.tokens * job.model.vocab / t * job.last * (t > 1)
    shapes = own.layer_shapes(job.model, t) * layers + own.end_shapes(job)
    n, held = own.count(shapes), own.count(shapes, p.dp if p.zero else 1)
    copied = 8.0 * n if p.dp > 1 else 0.0
    rows = job.micro_batch
    return (
        rows * layers * layer / t / at.peak,
        rows * head / t / at.peak,
        moved / at.bandwidth,
        (28.0 * held + copied) / at.bandwidth,
        float(layers * passes),
    )


def calibrated(found: Mapping[str, Sequence[float]], model: ModelConfig, length: int) -> Machine:
    """The machine from the fastest round of what `bench.steps` timed (other processes only ever
    add): least squares of the relative error over the single-process steps, no factor negative.
    Elementwise work is taken at the bandwidth: in steps of one width it grows as products do."""
    best = {k: min(v) for k, v in found.items()}
    at = Machine(
        peak=2.0 * SIDE**3 / best["gemm bfloat16"],
        bandwidth=READ / best["memory read"],
        messages={k: [best[f"{k} {size}"] for size in SIZES] for k in MESSAGES},
    )
    told = steps_alone(model)
    table = [nominal(_alone_job(model, a, length), at) for a in told]
    seconds = np.array([best[a.name] for a in told])
    rows = np.array(table) / seconds[:, None]
    fixed = PARTS.index("elementwise")
    rest = np.delete(rows, fixed, axis=1)
    factors = fit_bounded(rest, 1.0 - rows[:, fixed], np.zeros(len(PARTS) - 1))
    return dataclasses.replace(at, factors=(*factors[:fixed], 1.0, *factors[fixed:]))


def _alone_job(model: ModelConfig, a: StepAlone, length: int) -> Job:
    part = dataclasses.replace(model, num_layers=a.num_layers, vocab=a.vocab)
    return Job(model=part, plan=Plan(), pp_rank=0, length=length, micro_batch=a.batch)


def predicted(
    at: Machine, model: ModelConfig, plan: Plan, length: int, global_batch: int
) -> dict[str, float]:
    """Seconds of a step by part. The slowest stage works all its micro-batches, the others fill
    and drain with one."""
    stages = [
        own.predict(model, plan, stage * plan.tp * plan.dp, length, global_batch)
        for stage in range(plan.pp)
    ]
    each = [at.seconds(job) for job in stages]
    whole = [sum(s.values()) for s in each]
    slowest = whole.index(max(whole))
    m = plan.micro_batches
    fill = sum((w - s["optimizer"]) / m for w, s in zip(whole, each, strict=True))
    fill -= (whole[slowest] - each[slowest]["optimizer"]) / m
    return each[slowest] | {"bubble": fill}


def write_cluster(path: str, at: Machine, machine: Mapping[str, Any], processes: int) -> None:
    """The machine as `glm-core plan --cluster` reads it; memory and power are the preset's. Raises
    ConfigError."""
    read = at.bandwidth / 1e9
    link = f"{min(SIZES[-1] / at.messages['all_reduce'][-1] / 1e9, read):.4g} GB/s"
    told = {
        "chip": "CPU",
        "name": "here",
        "chips": processes,
        "chips_per_node": processes,
        "peak": f"{at.peak / 1e9:.4g} GFLOPS",
        "memory_bandwidth": f"{read:.4g} GB/s",
        "link_within_node": link,
        "link_between_nodes": link,
        "source": f"measured by glm-core plan measure on {processes} processes of "
        f"{machine['cpu']}, one thread each, all at once; memory and power assumed",
    }
    try:
        Path(path).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {path}: {error.strerror}; name another file") from error


def checked_plans(texts: Sequence[str], model: ModelConfig, wanted: Timings) -> dict[str, Plan]:
    """The plans by their text. Raises ConfigError where one cannot be run."""
    found = {text: parse(text) for text in texts}
    for plan in found.values():
        require_fit(
            plan,
            model,
            world=wanted.processes,
            global_batch=wanted.global_batch,
            length=wanted.length,
        )
    return found


def report(
    at: Machine,
    forecast: Mapping[str, Mapping[str, float]],
    first: Mapping[str, Sequence[float]],
    found: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Predicted beside measured, the fastest round; drift is how many times as long single-process
    steps took by the time of the measurement."""
    middle = statistics.median
    drift = middle(min(v) / min(first[k]) for k, v in found.items() if k.startswith("alone"))
    rows: list[dict[str, Any]] = []
    for plan, parts in forecast.items():
        seconds, measured = sum(parts.values()), min(found[plan])
        rows.append(
            {
                "plan": plan,
                "predicted_step_s": seconds,
                "measured_step_s": measured,
                "error": seconds / measured - 1,
                "error_without_drift": seconds * drift / measured - 1,
                "parts_s": dict(parts),
                "rounds_s": list(found[plan]),
            }
        )
    return {
        "rows": rows,
        "drift": drift,
        "peak_gflops": at.peak / 1e9,
        "read_gb_s": at.bandwidth / 1e9,
        "factors": dict(zip(PARTS, at.factors, strict=True)),
        "median_abs_error": middle(abs(r["error"]) for r in rows),
        "median_abs_error_without_drift": middle(abs(r["error_without_drift"]) for r in rows),
        "alone_s": {a: min(v) for a, v in first.items() if a.startswith("alone")},
        "messages_s": dict(at.messages),
    }
