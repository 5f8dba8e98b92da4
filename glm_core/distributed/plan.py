"""The plan: sizes of the parallel groups, and what each step does. Imports no torch."""

from __future__ import annotations

import dataclasses
from typing import Literal

from glm_core.config import ModelConfig, check, divisors, positive
from glm_core.errors import ConfigError, unknown
from glm_core.versions import lack_of

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "zbv"]
Recompute = Literal["none", "selective", "full"]
EMBEDDINGS = ("embedding", "position_embedding", "block_embedding")
"""the parameters that embed a token"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How a global batch and a model are split over tp x pp x dp processes; words as in the
    planner. Ranks are numbered with tp fastest, then dp, then pp. Of the dp ranks, each ep
    neighbours share the experts, as in Megatron-LM and DeepSpeed."""

    tp: int = 1
    """tensor parallel: processes that share every matrix"""
    pp: int = 1
    """pipeline parallel: processes that share the layers"""
    dp: int = 1
    """data parallel: processes that share the global batch's rows"""
    ep: int = 1
    """expert parallel: of the data-parallel processes, so many share every layer's experts, and
    send each other the tokens"""
    zero: int = 0
    """what data-parallel ranks share: 0 nothing, 1 optimizer, 2 gradients too, 3 weights too"""
    sp: bool = False
    """sequence parallel: norms and residuals split over the tensor-parallel group"""
    micro_batches: int = 1
    """of one step, per data-parallel rank"""
    schedule: Schedule = "1f1b"
    """order of the pipeline's work: GPipe (Huang et al. 2019), 1F1B and interleaved (Narayanan et
    al. 2021), zero-bubble and its V shape (Qi et al. 2023)"""
    virtual: int = 1
    """pipeline stages per process; interleaved and zero-bubble take any number, zbv takes 2"""
    recompute: Recompute = "none"
    """selective: attention's core again in the backward pass; full: whole layers"""

    def __post_init__(self) -> None:
        looped = self.schedule in ("interleaved", "zero-bubble")
        check(
            self,
            positive("tp pp dp ep micro_batches virtual"),
            {
                "ep": self.dp % max(self.ep, 1) == 0
                or f"does not divide dp={self.dp}, whose processes share the experts; use dp="
                f"{self.ep} or a multiple",
                "zero": self._zero_rule(),
                "sp": not self.sp or self.tp > 1 or "needs tp > 1; leave it out",
                "virtual": self._virtual_rule(looped),
                "schedule": self.pp > 1
                or self.schedule == "1f1b"
                or "needs pp > 1; leave it out or split the layers",
                "recompute": self.recompute == "none"
                or self.schedule not in ("zero-bubble", "zbv")
                or f"does not go with schedule={self.schedule!r}, which splits the backward pass; "
                "use none, or schedule interleaved",
                "micro_batches": not looped
                or self.micro_batches % max(self.pp, 1) == 0
                or f"is no multiple of pp={self.pp}; schedule={self.schedule!r} needs one",
            },
        )

    def _zero_rule(self) -> str | bool:
        if self.zero not in range(4):
            return "must be 0, 1, 2 or 3"
        if self.zero and self.dp == 1:
            return "needs dp > 1; use zero=0"
        # FSDP2 frees what the second half of a split backward pass still needs (torch 2.13)
        return not (self.zero == 3 and self.schedule in ("zero-bubble", "zbv")) or (
            f"does not go with schedule={self.schedule!r}; use zero=2, or schedule interleaved"
        )

    def _virtual_rule(self, looped: bool) -> str | bool:
        if looped:
            return True
        need = 2 if self.schedule == "zbv" else 1
        more = "; use interleaved or zero-bubble for more" if need == 1 else ""
        return self.virtual == need or f"must be {need} with schedule={self.schedule!r}{more}"

    @property
    def world(self) -> int:
        """Processes."""
        return self.tp * self.pp * self.dp

    @property
    def stages(self) -> int:
        """Pipeline stages in all."""
        return self.pp * self.virtual

    def label(self) -> str:
        """`tp=2,pp=2,schedule=gpipe`: what differs from the default; `parse` reads it back."""
        parts = [
            f"{f.name}={value}"
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) != f.default
        ]
        return ",".join(parts) or "tp=1"


def parse(text: str) -> Plan:
    """`tp=2,pp=2,micro_batches=4` as a plan. Raises ConfigError that names every bad part."""
    kinds = {f.name: f.type for f in dataclasses.fields(Plan)}
    values: dict[str, int | str | bool] = {}
    wrong = []
    for part in filter(None, text.split(",")):
        key, _, raw = part.partition("=")
        value = _value(str(kinds.get(key, "")), raw)
        if key not in kinds:
            wrong.append(unknown("plan key", key, kinds))
        elif value is None:
            wrong.append(f"{key}={raw!r}: expected {kinds[key]}, for example tp=2,sp=true")
        else:
            values[key] = value
    if wrong:
        raise ConfigError(f"plan {text!r}: " + "; ".join(wrong))
    return Plan(**values)  # type: ignore[arg-type]  # each value has its field's type, or check reports it


def _value(kind: str, raw: str) -> int | str | bool | None:
    if kind == "int":
        return int(raw) if raw.isdecimal() else None
    if kind == "bool":
        return {"true": True, "false": False}.get(raw.lower())
    return raw


def require_fit(
    plan: Plan, model: ModelConfig, *, world: int, global_batch: int, length: int
) -> None:
    """Raises one ConfigError that lists why these processes cannot train this model so.

    world: processes there are; global_batch: sequences a step; length: tokens a sequence."""
    rows, t = plan.dp * plan.micro_batches, plan.tp
    rules = {
        f"tp * pp * dp = {plan.world} processes, started {world}; start {plan.world}, or set "
        f"dp={max(1, world // (plan.tp * plan.pp))}": plan.world == world,
        f"tp={t} does not divide num_heads={model.num_heads}; use "
        + divisors(model.num_heads): model.num_heads % t == 0,
        f"tp={t} does not divide num_kv_heads={model.num_kv_heads}; use "
        + divisors(model.num_kv_heads): model.num_kv_heads % t == 0,
        f"tp={t} does not divide ffn={model.ffn}; pad ffn": model.ffn % t == 0,
        f"tp={t} does not divide vocab={model.vocab}; pad vocab": model.vocab % t == 0,
        f"pp * virtual = {plan.stages} stages exceed num_layers={model.num_layers}; use "
        "fewer": plan.stages <= model.num_layers,
        f"sp: tp={t} does not divide length={length}; pad the sequences": not plan.sp
        or length % t == 0,
        f"schedule=zbv with zero={plan.zero}: one process would shard the embedding in two "
        "stages; use zero=0, or schedule zero-bubble": plan.schedule != "zbv"
        or not plan.zero
        or not at_both_ends(model),
        f"dp * micro_batches = {rows} does not divide global_batch={global_batch}; use a "
        "multiple": global_batch % rows == 0,
        **_sparse_rules(plan, model),
    }
    broken = [fact for fact, kept in rules.items() if not kept]
    if broken := broken + lacks(plan):
        raise ConfigError(f"plan {plan.label()}: " + "; ".join(broken))


def _sparse_rules(plan: Plan, model: ModelConfig) -> dict[str, bool]:
    """Returns the rules of `require_fit` for experts and layers of multi-token prediction."""
    t, num_experts = plan.tp, model.num_experts
    return {
        f"ep={plan.ep} needs a model with experts; leave it out": plan.ep == 1 or num_experts > 0,
        f"ep={plan.ep} does not divide num_experts={num_experts}; use "
        + divisors(num_experts): num_experts % plan.ep == 0,
        f"tp={t} does not divide expert_ffn={model.expert_ffn}; use "
        + divisors(model.expert_ffn): model.expert_ffn % t == 0,
        # the first of two passes through an op frees what the second needs (torch 2.13)
        f"schedule={plan.schedule}: torch's split backward pass would go twice through the layers "
        f"of multi-token prediction, since num_mtp_layers={model.num_mtp_layers} and tied_head="
        f"{str(model.tied_head).lower()}; use 1f1b or interleaved, or one such layer and an untied "
        "head": plan.schedule not in ("zero-bubble", "zbv")
        or model.num_mtp_layers <= int(not model.tied_head),
    }


def replicated(name: str) -> bool:
    """Returns whether every rank holds this parameter whole. Under sequence parallelism each rank
    then has only its tokens' share of the gradient, and the shares must be summed."""
    table = name in ("embedding", "head")
    split = ("qkv", "q", "q_b", "kv_b", "up", "experts_up", "experts_down")
    matrix = any(f".{part}." in name for part in split)
    return not (table or matrix or name.endswith(("out.weight", "down.weight")))


def partial(name: str) -> bool:
    """Returns whether every rank holds this parameter whole and has only its heads' or features'
    share of the gradient, with or without sequence parallelism: norms of heads, routers, and what
    makes the latents."""
    latent = ("q_a", "q_a_norm", "kv_a", "kv_a_norm")
    return any(f".{part}." in name for part in ("q_norm", "k_norm", "router", *latent))


def at_both_ends(model: ModelConfig) -> tuple[str, ...]:
    """Returns the parameters that the first and the last stage of a pipeline both hold: a tied
    embedding, and whatever embeds the tokens of layers of multi-token prediction."""
    if model.num_mtp_layers:
        return EMBEDDINGS if model.positions == "learned_2d" else EMBEDDINGS[:1]
    return EMBEDDINGS[: int(model.tied_head)]


def lacks(plan: Plan) -> list[str]:
    """Returns what the plan asks for that only a newer torch can do."""
    reasons = [lack_of("fsdp_sums", f"zero={plan.zero}")] if plan.zero else []
    if plan.schedule in ("zero-bubble", "zbv"):
        reasons.append(lack_of("weight_gradients_apart", f"schedule={plan.schedule}"))
    return [reason for reason in reasons if reason]


def stage_layers(num_layers: int, stages: int, further: int = 0) -> list[range]:
    """Returns the layers of every stage. Embedding and head count as a layer each, so the first and
    the last stage are lighter: 70 layers on 8 stages are 8, 9 x 6, 8, as GLM-130B has them (Zeng et
    al. 2022, section 2.3). Where that would leave an end without a layer they do not count.
    further: layers of multi-token prediction, which the last stage holds besides; each counts as
    two, itself and its pass through the head, or less where that leaves the stage no other."""
    ends = 1 if stages > 1 and num_layers + 2 >= 2 * stages else 0
    sizes = _stage_sizes(num_layers, stages, ends, 0)
    for more in range(1, 2 * further * ends + 1):
        heavier = _stage_sizes(num_layers, stages, ends, more)
        sizes = heavier if heavier[-1] > 0 else sizes
    starts = [sum(sizes[:s]) for s in range(stages)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _stage_sizes(num_layers: int, stages: int, ends: int, further: int) -> list[int]:
    """Returns the number of layers of every stage. Both ends count as `ends` layers, and what else
    the last stage does as `further`."""
    base, extra = divmod(num_layers + 2 * ends + further, stages)
    first_extra = (stages - extra) // 2  # what does not divide goes to the middle
    sizes = [base + (first_extra <= s < first_extra + extra) for s in range(stages)]
    sizes[0], sizes[-1] = sizes[0] - ends, sizes[-1] - ends - further
    return sizes


def stages_of(plan: Plan, pp_rank: int) -> list[int]:
    """Returns the stages a process holds: every pp-th, or in the V shape one from each end."""
    if plan.schedule == "zbv":
        return [pp_rank, plan.stages - 1 - pp_rank]
    return list(range(pp_rank, plan.stages, plan.pp))
