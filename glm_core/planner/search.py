"""Searches the plans that a cluster can run and counts why the others are rejected."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from glm_core.planner.cluster import Cluster
from glm_core.planner.cost import Work, fullest_stage
from glm_core.planner.efficiency import Step, predict
from glm_core.planner.sizing import RECOMPUTES, Sizing, broken_rules

MICRO_BATCHES = (1, 2, 4, 8, 16)
CHUNKS = (1, 2, 3, 5)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """The tokens to train on, and limits; None is no limit."""

    tokens: float
    days: float | None = None
    energy_mwh: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A plan with the memory, time and energy it takes."""

    plan: Sizing
    memory: dict[str, float]
    """by part: bytes on a chip of the fullest stage"""
    step: Step
    days: float
    energy_mwh: float

    def to_json(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self.plan),
            "label": self.plan.label(),
            "memory_bytes": self.memory,
            "peak_bytes": sum(self.memory.values()),
            "step_s": self.step.seconds,
            "step_parts_s": self.step.parts,
            "bubble": self.plan.bubble,
            "mfu": self.step.mfu,
            "hfu": self.step.hfu,
            "days": self.days,
            "energy_mwh": self.energy_mwh,
        }


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The result of a search."""

    feasible: list[Candidate]
    """fastest first"""
    rejected: Counter[str]
    """by kind of reason: how many plans"""
    nearest: tuple[Candidate, list[str]] | None
    """the plan that exceeds its limits by least, with its reasons; None where no plan was rejected
    for a limit"""


def candidate(plan: Sizing, work: Work, cluster: Cluster, tokens: float, stack: str) -> Candidate:
    """Returns the plan with its memory, time and energy."""
    step = predict(plan, work, cluster, stack)
    seconds = tokens / (plan.global_batch * work.seq) * step.seconds
    energy = cluster.chips * cluster.power * seconds / 3.6e9
    return Candidate(
        plan=plan,
        memory=fullest_stage(plan, work),
        step=step,
        days=seconds / 86400,
        energy_mwh=energy,
    )


def exceeded_limits(
    candidate: Candidate, cluster: Cluster, budget: Budget
) -> dict[str, tuple[float, str]]:
    """Returns the limits that a plan exceeds, by kind: needed over available, and a sentence."""
    needed = sum(candidate.memory.values())
    limits = {
        "memory": (needed, cluster.memory, 1e9, "GB a chip"),
        "days": (candidate.days, budget.days, 1.0, "days"),
        "energy": (candidate.energy_mwh, budget.energy_mwh, 1.0, "MWh"),
    }
    return {
        kind: (
            value / limit,
            f"{kind}: needs {value / unit:.1f} {name}, "
            f"{(value - limit) / unit:.1f} more than {limit / unit:.1f}",
        )
        for kind, (value, limit, unit, name) in limits.items()
        if limit is not None and value > limit
    }


def search(
    work: Work,
    cluster: Cluster,
    global_batch: int,
    budget: Budget,
    fixed: Mapping[str, Any] | None = None,
    stack: str = "",
) -> Outcome:
    """Tries every plan of the usual sizes; where `fixed` names plan fields, only plans that have
    these values."""
    feasible, rejected = [], Counter[str]()
    nearest: tuple[float, Candidate, list[str]] | None = None
    for plan in plans(work, cluster, global_batch, fixed or {}):
        if broken := broken_rules(plan, work.model):
            rejected[_kind(broken[0])] += 1
            continue
        priced = candidate(plan, work, cluster, budget.tokens, stack)
        exceeded = exceeded_limits(priced, cluster, budget)
        if not exceeded:
            feasible.append(priced)
            continue
        rejected.update(list(exceeded))
        worst = max(ratio for ratio, _ in exceeded.values())
        if nearest is None or worst < nearest[0]:
            nearest = (worst, priced, [fact for _, fact in exceeded.values()])
    feasible.sort(key=lambda c: c.step.seconds)
    return Outcome(feasible=feasible, rejected=rejected, nearest=nearest[1:] if nearest else None)


def _kind(rule: str) -> str:
    """Returns the kind of a broken rule: `tp` for `tp=3 does not divide num_heads=32`."""
    return "rule: " + rule.split("=")[0].split(" ")[0]


def plans(
    work: Work, cluster: Cluster, global_batch: int, fixed: Mapping[str, Any]
) -> Iterator[Sizing]:
    """Yields the plans whose sizes multiply to the cluster's chips."""

    def choices(name: str, usual: tuple[Any, ...]) -> tuple[Any, ...]:
        return (fixed[name],) if name in fixed else usual

    divisors = tuple(n for n in range(1, cluster.chips + 1) if cluster.chips % n == 0)
    of_one_node = tuple(n for n in divisors if n <= cluster.chips_per_node)
    up_to_layers = tuple(n for n in divisors if n <= work.model.num_layers)
    for tp, pp in itertools.product(choices("tp", of_one_node), choices("pp", up_to_layers)):
        dp = fixed.get("dp", cluster.chips // (tp * pp))
        if tp * pp * dp != cluster.chips:
            continue
        for ep, zero, sp, mb, recompute, virtual in itertools.product(
            choices("ep", expert_ranks(work, dp)),
            choices("zero", (0, 1) if pp > 1 else (0, 1, 2, 3)),
            choices("sp", (False, True) if tp > 1 else (False,)),
            choices("micro_batch", MICRO_BATCHES),
            choices("recompute", RECOMPUTES),
            choices("virtual", CHUNKS if pp > 1 else (1,)),
        ):
            yield Sizing(
                tp=tp,
                pp=pp,
                dp=dp,
                ep=ep,
                zero=zero,
                sp=sp,
                micro_batch=mb,
                recompute=recompute,
                virtual=virtual,
                global_batch=global_batch,
            )


def expert_ranks(work: Work, dp: int) -> tuple[int, ...]:
    """Returns the usual sizes of an expert-parallel group: those that divide both."""
    both = math.gcd(work.model.num_experts, dp) if work.model.num_experts else 1
    return tuple(n for n in range(1, both + 1) if both % n == 0)


def nearest_feasible(wanted: Mapping[str, Any], feasible: list[Candidate]) -> Candidate | None:
    """Returns the feasible plan that differs from the wanted fields in the fewest, the fastest
    where several do; None where nothing is feasible."""

    def changes(candidate: Candidate) -> int:
        return sum(getattr(candidate.plan, k) != v for k, v in wanted.items())

    return min(feasible, key=lambda c: (changes(c), c.step.seconds), default=None)
