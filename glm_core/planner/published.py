"""Reads the published runs that the planner is fitted to and checked against: model, plan, chips
and seconds of a step. They are data, in `published.csv`, each with its source and where it was
seen."""

from __future__ import annotations

import csv
import dataclasses
import functools
from pathlib import Path

from glm_core.config import ModelConfig
from glm_core.planner import cluster as clusters
from glm_core.planner.cost import Ideal, Work, hardware_flops, ideal, model_flops
from glm_core.planner.sizing import RECOMPUTES, Sizing

FILE = Path(__file__).with_name("published.csv")
ROLES = ("fit", "held", "skip")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One published run."""

    source: str
    model: str
    role: str
    """fit: factors are fitted to it; held: it is only predicted; skip: it cannot be predicted"""
    checked: str
    """where the figures were seen; `memory` where they are quoted from memory"""
    stack: str
    cluster: clusters.Cluster
    work: Work
    plan: Sizing
    step_s: float
    """as reported, or our count of FLOPs over the reported TFLOPS; NaN where neither is reported"""
    memory_gb: float
    """reported peak of a chip, GB; NaN where none is reported"""
    note: str
    """what is special about the run, or why its prediction misses"""
    url: str

    @property
    def ideal(self) -> Ideal:
        return ideal(self.plan, self.work, self.cluster)


@functools.cache
def runs() -> tuple[Run, ...]:
    """Returns every run of the file, in its order."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return tuple(_run(row) for row in csv.DictReader(file))


def _run(row: dict[str, str]) -> Run:
    work = Work(
        model=_model(row), seq=int(row["seq"]), fused_attention=row["fused_attention"] == "1"
    )
    sizes = ("tp", "pp", "dp", "virtual", "zero", "micro_batch", "global_batch")
    [recompute] = [r for r in RECOMPUTES if r == row["recompute"]]
    plan = Sizing(**{k: int(row[k]) for k in sizes}, sp=row["sp"] == "1", recompute=recompute)
    texts = ("source", "model", "role", "checked", "stack", "note", "url")
    return Run(
        **{k: row[k] for k in texts},
        work=work,
        plan=plan,
        cluster=clusters.preset(row["chip"], int(row["chips"])),
        step_s=_seconds(row, work, plan),
        memory_gb=float(row["memory_gb"] or "nan"),
    )


def _model(row: dict[str, str]) -> ModelConfig:
    return ModelConfig(
        num_layers=int(row["layers"]),
        hidden=int(row["hidden"]),
        num_heads=int(row["heads"]),
        num_kv_heads=int(row["kv_heads"]),
        head_dim=int(row["head_dim"]),
        ffn=int(row["ffn"]),
        vocab=int(row["vocab"]),
        max_length=int(row["seq"]),
        norm="layer",
        placement="pre",
        activation="swiglu" if row["gated"] == "1" else "gelu",
        positions="rope",
    )


def _seconds(row: dict[str, str], work: Work, plan: Sizing) -> float:
    if row["step_s"]:
        return float(row["step_s"])
    if not row["tflops"]:
        return float("nan")
    hardware = row["counts"] == "hardware"
    flops = hardware_flops(work, plan.recompute) if hardware else model_flops(work)
    return flops * plan.global_batch / (plan.chips * float(row["tflops"]) * 1e12)
