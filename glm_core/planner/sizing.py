"""Defines the sizes by which a training step is spread over chips, and the rules they obey."""

from __future__ import annotations

import dataclasses
from typing import get_args

from glm_core.config import ModelConfig
from glm_core.distributed.plan import Recompute

RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sizing:
    """The sizes of parallel groups and batch that the planner prices, for any software.
    `distributed.plan.Plan` is what our own trainer runs."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    """expert parallel: of the data-parallel chips, so many share every layer's experts"""
    virtual: int = 1
    """pipeline chunks of a chip; more than 1 is the interleaved schedule"""
    zero: int = 0
    """what data-parallel ranks share: 0 nothing, 1 optimizer, 2 gradients too, 3 weights too"""
    sp: bool = False
    """sequence parallelism: norms and dropouts split over the tensor-parallel group"""
    micro_batch: int = 1
    global_batch: int = 1
    """sequences of an optimizer step"""
    recompute: Recompute = "none"
    """what the backward pass recomputes: nothing, attention's core, or whole layers"""

    @property
    def chips(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def micro_batches(self) -> float:
        """m: micro-batches of a pipeline in a step."""
        return self.global_batch / (self.dp * self.micro_batch)

    @property
    def bubble(self) -> float:
        """The share of the step in which a stage waits: (p - 1) / (v m + p - 1)."""
        wait = (self.pp - 1) / self.virtual
        return wait / (self.micro_batches + wait)

    def label(self) -> str:
        """Returns a short name: `TP4 PP8 DP24 ZeRO1 SP mb1 full 1F1B`."""
        schedule = "" if self.pp == 1 else "1F1B" if self.virtual == 1 else f"1F1Bx{self.virtual}"
        zero = f"ZeRO{self.zero}" if self.zero else ""
        sp = "SP" if self.sp else ""
        experts = f"EP{self.ep}" if self.ep > 1 else ""
        parts = [f"TP{self.tp} PP{self.pp} DP{self.dp}", experts, zero, sp, f"mb{self.micro_batch}"]
        return " ".join(p for p in [*parts, self.recompute, schedule] if p)


def broken_rules(plan: Sizing, model: ModelConfig) -> list[str]:
    """Returns why this model cannot be split by the plan; empty where it can."""
    t, p = plan.tp, plan.pp
    rules = {
        f"tp={t} does not divide num_heads={model.num_heads}": model.num_heads % t == 0,
        f"tp={t} does not divide num_kv_heads={model.num_kv_heads} nor is a multiple of it": (
            model.num_kv_heads % t == 0 or t % model.num_kv_heads == 0
        ),
        f"tp={t} does not divide ffn={model.ffn}": model.ffn % t == 0,
        f"tp={t} does not divide expert_ffn={model.expert_ffn}": model.expert_ffn % t == 0,
        f"ep={plan.ep} does not divide num_experts={model.num_experts}": plan.ep == 1
        or (model.num_experts > 0 and model.num_experts % plan.ep == 0),
        f"ep={plan.ep} does not divide dp={plan.dp}": plan.dp % plan.ep == 0,
        f"pp={p} exceeds num_layers={model.num_layers}": p <= model.num_layers,
        f"virtual={plan.virtual} needs pp > 1 and num_layers={model.num_layers} divisible by "
        f"pp * virtual = {p * plan.virtual}": plan.virtual == 1
        or (p > 1 and model.num_layers % (p * plan.virtual) == 0),
        f"pp={p} leaves the last stage without a layer of num_layers={model.num_layers}": (
            -(-model.num_layers // p) * (p - 1) < model.num_layers
        ),
        "sp needs tp > 1": not plan.sp or t > 1,
        f"zero={plan.zero} needs dp > 1": plan.zero == 0 or plan.dp > 1,
        f"zero={plan.zero} with pp={p}: gradients or weights are gathered every micro-batch": (
            plan.zero < 2 or p == 1
        ),
        f"dp * micro_batch = {plan.dp * plan.micro_batch} does not divide "
        f"global_batch={plan.global_batch}": plan.global_batch % (plan.dp * plan.micro_batch) == 0,
    }
    return [fact for fact, holds in rules.items() if not holds]
