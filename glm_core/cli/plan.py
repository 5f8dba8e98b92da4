"""`glm-core plan`: searches plans for a model on a cluster, and shows how good the predictions
are."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from glm_core.cli.exits import EXIT_FAILED
from glm_core.cli.options import add_json, columns, emit, output_file

if TYPE_CHECKING:
    from glm_core.planner.cluster import Cluster
    from glm_core.planner.search import Candidate, Outcome

FIXED = ("tp", "pp", "dp", "ep", "zero", "virtual", "micro_batch")
CARDS = ((8, 40, "A100"), (8, 32, "V100"), (4, 24, "RTX 3090"), (8, 11, "RTX 2080 Ti"))
"""(cards, GiB of a card, name): the machines that GLM-130B is published for (its README, hardware
requirements)"""
ONE_CARD = ((1, 80, "A100"), (1, 24, "RTX 3090"))
"""what `generate --offload cpu` can compute on"""
AS_PUBLISHED = {"preset": "glm-130b", "global_batch": 4224, "seq": 2048}
SMALL = {"preset": "glm4-34m", "global_batch": 8, "seq": 128}
"""default model and batch: GLM-130B's training; for `measure` one that two processes can do"""
STACKS = ("megatron", "megatron-deepspeed", "fsdp")


def define(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "action",
        nargs="?",
        default="search",
        choices=("search", "validate", "slides", "inference", "dry-run", "measure"),
        help="search plans (default); validate the planner against published runs; print the "
        "utilisation table of the GLM slides; print the memory that inference takes on small "
        "cards; dry-run one rank's step of a plan without memory; predict steps on this machine "
        "and measure them",
    )
    parser.add_argument("--preset", metavar="NAME", help="default glm-130b; measure: glm4-34m")
    parser.add_argument("--chip", default="A100-40G", metavar="NAME", help="default %(default)s")
    parser.add_argument("--chips", type=int, default=768, metavar="N", help="default %(default)s")
    parser.add_argument("--cluster", metavar="FILE", help="JSON with units, instead of --chip")
    parser.add_argument(
        "--tokens", type=float, default=400e9, metavar="T", help="trained on; default 400e9"
    )
    parser.add_argument(
        "--global-batch", type=int, metavar="N", help="sequences; default 4224; measure: 8"
    )
    parser.add_argument("--seq", type=int, metavar="N", help="tokens; default 2048; measure: 128")
    parser.add_argument("--days", type=float, metavar="D", help="limit in days")
    parser.add_argument("--energy", type=float, metavar="MWH", help="limit in MWh")
    for name in FIXED:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, metavar="N", help="only this value"
        )
    parser.add_argument(
        "--recompute", choices=("none", "selective", "full"), help="only this value"
    )
    parser.add_argument(
        "--sp", action=argparse.BooleanOptionalAction, help="only plans with or without it"
    )
    parser.add_argument(
        "--stack", choices=STACKS, default="", help="whose factors apply; default: by plan"
    )
    parser.add_argument(
        "--unfused-attention", action="store_true", help="scores are written to memory"
    )
    parser.add_argument(
        "--plan", metavar="TP=N,...", help="dry-run, measure: tp=4,pp=8,dp=24,zero=1,..."
    )
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="dry-run: which rank")
    parser.add_argument("--backend", default="cpu", metavar="NAME", help="dry-run: whose kernels")
    parser.add_argument(
        "--rounds", type=int, default=7, metavar="N", help="measure: default %(default)s"
    )
    parser.add_argument(
        "--out",
        type=output_file,
        metavar="FILE",
        help="measure: write this machine as a --cluster file",
    )
    parser.add_argument(
        "--link",
        type=float,
        default=25.0,
        metavar="GB/S",
        help="inference: bandwidth from main memory to a card, for --offload (default %(default)g, "
        "what PCIe 4.0 x16 is good for)",
    )
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="plans shown, default %(default)s"
    )
    parser.add_argument(
        "--explain", action="store_true", help="print every formula with its source"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exits 0; 1 where no plan fits or the validation fails; 2 on usage errors."""
    from glm_core.cli import plan_trainer

    actions = {
        "search": run_search,
        "validate": run_validate,
        "slides": run_slides,
        "inference": run_inference,
        "dry-run": plan_trainer.run_dry,
        "measure": plan_trainer.run_measure,
    }
    for name, size in (SMALL if args.action == "measure" else AS_PUBLISHED).items():
        if getattr(args, name) is None:
            setattr(args, name, size)
    return actions[args.action](args)


def run_search(args: argparse.Namespace) -> int:
    """Prints the fastest plans. Exits 1 where none fits, with the one that exceeds its limits by
    least."""
    from glm_core.errors import ConfigError
    from glm_core.model.presets import preset
    from glm_core.planner import cluster, search
    from glm_core.planner.cost import Work, stages

    where = cluster.load(args.cluster) if args.cluster else cluster.preset(args.chip, args.chips)
    for name in ("tokens", "global_batch", "seq", "top"):
        if getattr(args, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(args, name)} must be positive")
    work = Work(model=preset(args.preset), seq=args.seq, fused_attention=not args.unfused_attention)
    options = {k: getattr(args, k) for k in (*FIXED, "recompute", "sp")}
    fixed = {k: v for k, v in options.items() if v is not None}
    budget = search.Budget(tokens=args.tokens, days=args.days, energy_mwh=args.energy)
    outcome = search.search(work, where, args.global_batch, budget, fixed, args.stack)
    nearest = None
    if not outcome.feasible and fixed:
        others = search.search(work, where, args.global_batch, budget, {}, args.stack)
        nearest = search.nearest_feasible(fixed, others.feasible)
    result = outcome_json(outcome, where, nearest, args.top)
    result["efficiency"] = efficiency_of(outcome, where, args.stack)
    if outcome.feasible:
        result["stages"] = stages(outcome.feasible[0].plan, work)
    emit(args, result, outcome_text(args, outcome, where, nearest))
    return 0 if outcome.feasible else EXIT_FAILED


def outcome_json(
    outcome: Outcome, where: Cluster, nearest: Candidate | None, top: int
) -> dict[str, Any]:
    """Returns the result for `--json`."""
    return {
        "cluster": {"name": where.name, "chips": where.chips, "source": where.source},
        "plans": [c.to_json() for c in outcome.feasible[:top]],
        "feasible": len(outcome.feasible),
        "rejected": dict(outcome.rejected),
        "least_missing": _closest(outcome),
        "nearest_feasible": nearest.to_json() if nearest else None,
    }


def efficiency_of(outcome: Outcome, where: Cluster, stack: str) -> dict[str, dict[str, Any]]:
    """Returns the fitted factors behind the predictions, by stack, with the runs they come from."""
    from glm_core.planner.efficiency import fitted, stack_of

    stacks = {stack or stack_of(c.plan) for c in outcome.feasible}
    return {s: asdict(fitted(where.family, s)) for s in sorted(stacks)}


def _closest(outcome: Outcome) -> dict[str, Any] | None:
    if outcome.nearest is None:
        return None
    closest, reasons = outcome.nearest
    return {"plan": closest.plan.label(), "reasons": reasons}


def outcome_text(
    args: argparse.Namespace, outcome: Outcome, where: Cluster, nearest: Candidate | None
) -> str:
    """Returns the result as tables for people."""
    rows = [["plan", "GB a chip", "step s", "bubble", "MFU", "HFU", "days", "MWh"]]
    rows += [_row(c) for c in outcome.feasible[: args.top]]
    lines = [f"{args.preset} on {where.chips} x {where.name}: {len(outcome.feasible)} plans fit"]
    lines += [columns(rows), *_parts(outcome.feasible[0])] if outcome.feasible else []
    counts = ", ".join(f"{kind} {n}" for kind, n in outcome.rejected.most_common())
    lines += [f"rejected: {counts or 'none'}"]
    closest = _closest(outcome)
    if closest and not outcome.feasible:
        lines += [f"misses by least: {closest['plan']}: {'; '.join(closest['reasons'])}"]
    if not outcome.feasible:
        fits = columns([rows[0], _row(nearest)]) if nearest else "no other plan fits either"
        lines += ["nearest that fits:", fits]
    lines += [f"{where.name}: {where.source}"]
    for stack, factors in efficiency_of(outcome, where, args.stack).items():
        lines += [f"efficiency of {stack} from {factors['origin']}"]
    return "\n".join([*lines, *(_formulas() if args.explain else [])])


def _row(c: Candidate) -> list[str]:
    return [
        c.plan.label(),
        f"{sum(c.memory.values()) / 1e9:.1f}",
        f"{c.step.seconds:.2f}",
        f"{c.plan.bubble:.1%}",
        f"{c.step.mfu:.1%}",
        f"{c.step.hfu:.1%}",
        f"{c.days:.1f}",
        f"{c.energy_mwh:.0f}",
    ]


def _parts(best: Candidate) -> list[str]:
    memory = ", ".join(f"{k} {v / 1e9:.1f}" for k, v in best.memory.items() if v)
    step = ", ".join(f"{k} {v:.2f}" for k, v in best.step.parts.items() if v)
    return [f"first: memory GB: {memory}", f"first: step s: {step}"]


def _formulas() -> list[str]:
    from glm_core.planner.formulas import FORMULAS

    return ["", *(f"{name}: {text}  [{source}]" for name, text, source in FORMULAS)]


def run_validate(args: argparse.Namespace) -> int:
    """Prints the comparison with published runs. Exits 1 where the median error of held-out rows
    exceeds 10 %, or a miss is not explained."""
    from glm_core.planner import validate

    report = validate.report()
    rows = [["source", "model", "chip", "rows", "predicted s", "reported s", "error", "note"]]
    for r in report["rows"]:
        role = "held" if r["held_out"] else "fit"
        seconds = [f"{r['predicted_step_s']:.2f}", f"{r['reported_step_s']:.2f}"]
        miss = abs(r["error"]) > validate.MISS
        rows.append(
            [
                r["source"],
                r["model"],
                r["chip"],
                role,
                *seconds,
                f"{r['error']:+.1%}",
                r["note"] if miss else "",
            ]
        )
    lines = [columns(rows), ""]
    for name, family in report["families"].items():
        lines += [
            f"{name}: median |error| {family['median_abs_error']:.1%} over "
            f"{family['held_out']} held-out rows"
        ]
    lines += [f"all: {report['median_abs_error_held_out']:.1%}"]
    lines += [f"memory, where it is reported: {report['median_abs_memory_error']:.1%}"]
    lines += [
        f"not predicted: {s['source']} {s['model']}: {s['reason']}" for s in report["skipped"]
    ]
    if args.explain:
        lines += [f"{k}: {f}" for k, f in report["factors"].items()] + _formulas()
    emit(args, report, "\n".join(lines))
    return 0 if validate.passes(report) else EXIT_FAILED


def run_slides(args: argparse.Namespace) -> int:
    """Prints the slides' table, recomputed. Exits 0."""
    from glm_core.planner import slides

    table = slides.table()
    rows = [["system", "chips", "model", "share", "peak TFLOPS", "days", "claimed", "implied peak"]]
    for r in table:
        peak = f"{r['peak_tflops']:g}" + (" (implied)" if r["peak_is_implied"] else "")
        rows.append(
            [
                r["system"],
                str(r["chips"]),
                f"{r['parameters_b']}B",
                f"{r['share']:.2%}",
                peak,
                f"{r['days']:.1f}",
                str(r["days_claimed"]),
                f"{r['implied_peak_tflops']:.1f}",
            ]
        )
    note = "days = 8 N T / (chips x peak x share), T = 300e9 tokens, full recomputation"
    emit(args, {"rows": table}, f"{columns(rows)}\n{note}")
    return 0


def run_inference(args: argparse.Namespace) -> int:
    """Prints what the weights, in row-wise int8 and int4, and one sequence's cache take on each
    card. Exits 0."""
    from glm_core.errors import ConfigError
    from glm_core.model.presets import preset
    from glm_core.model.quantize import Quantization, device_memory
    from glm_core.planner.offload import on_one_card

    if not args.link > 0:
        raise ConfigError(f"--link {args.link:g}: must be positive, in GB/s")
    model, results = preset(args.preset), list[dict[str, Any]]()
    for bits in (8, 4):
        for cards, room, name in CARDS + ONE_CARD:
            how = Quantization(bits=bits)
            cost = on_one_card(model, how, room << 30, args.seq, args.link) if cards == 1 else None
            memory = device_memory(model, how, cards, args.seq)
            results.append(
                {
                    "bits": bits,
                    "cards": cards,
                    "card": name,
                    "card_gib": room,
                    "weights_bytes": memory.weights,
                    "cache_bytes": memory.cache,
                    "fits": memory.total < room << 30,
                    "offloaded_tokens_s": 1 / cost.step_s if cost and cost.streamed else None,
                }
            )
    head = ["weights", "cards", "weights GiB", "cache GiB", "fits", "--offload cpu"]
    gib = [[f"{r[k] / 2**30:.2f}" for k in ("weights_bytes", "cache_bytes")] for r in results]
    rows = [
        [
            f"int{r['bits']}",
            f"{r['cards']} x {r['card']} {r['card_gib']}G",
            *sizes,
            "yes" if r["fits"] else "no",
            f"{r['offloaded_tokens_s']:.2g} tokens/s" if r["offloaded_tokens_s"] else "",
        ]
        for r, sizes in zip(results, gib, strict=True)
    ]
    note = (
        "per card, one sequence, without activations and the runtime's own memory; --offload cpu: "
        f"at most, over a link of {args.link:g} GB/s, never run on a GPU"
    )
    facts = {"preset": args.preset, "length": args.seq, "rows": results, "counts": note}
    emit(args, facts, f"{columns([head, *rows])}\n{note}")
    return 0
