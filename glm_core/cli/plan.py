"""`glm-core plan`: what a model would take on a cluster, and how far that can be believed."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from glm_core.cli.exits import EXIT_FAILED
from glm_core.cli.options import add_json, columns, emit

if TYPE_CHECKING:
    from glm_core.planner.cluster import Cluster
    from glm_core.planner.search import Candidate, Outcome

FIXED = ("tp", "pp", "dp", "zero", "virtual", "micro_batch")
CARDS = ((8, 40, "A100"), (8, 32, "V100"), (4, 24, "RTX 3090"), (8, 11, "RTX 2080 Ti"))
"""(cards, GiB each, name): those GLM-130B is published for (its README, hardware requirements)"""
PUBLISHED = {"preset": "glm-130b", "global_batch": 4224, "seq": 2048}
SMALL = {"preset": "glm4-34m", "global_batch": 8, "seq": 128}
"""model and batch where none is given: of GLM-130B's training, of what this machine does"""
STACKS = ("megatron", "megatron-deepspeed", "fsdp")


def define(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "action",
        nargs="?",
        default="search",
        choices=("search", "validate", "slides", "inference", "dry-run", "measure"),
        help="search plans (default), check the planner against published runs, print the "
        "utilisation table of the GLM slides, what inference takes on small cards, do one "
        "rank's step of a plan without memory, or predict and measure steps on this machine",
    )
    parser.add_argument("--preset", metavar="NAME", help="default glm-130b; measure: glm4-34m")
    parser.add_argument("--chip", default="A100-40G", metavar="NAME", help="default %(default)s")
    parser.add_argument("--chips", type=int, default=768, metavar="N", help="default %(default)s")
    parser.add_argument("--cluster", metavar="FILE", help="JSON with units, in place of --chip")
    parser.add_argument("--tokens", type=float, default=400e9, metavar="T", help="default 400e9")
    parser.add_argument("--global-batch", type=int, metavar="N", help="default 4224; measure: 8")
    parser.add_argument("--seq", type=int, metavar="N", help="tokens; default 2048; measure: 128")
    parser.add_argument("--days", type=float, metavar="D", help="budget")
    parser.add_argument("--energy", type=float, metavar="MWH", help="budget")
    for name in FIXED:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="fixed")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), help="fixed")
    parser.add_argument("--sp", action=argparse.BooleanOptionalAction, help="fixed")
    parser.add_argument("--stack", choices=STACKS, default="", help="whose efficiency; by plan")
    parser.add_argument("--unfused-attention", action="store_true", help="scores are written out")
    parser.add_argument("--plan", metavar="TP=N,...", help="dry-run: tp=4,pp=8,dp=24,zero=1,...")
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="dry-run: which rank")
    parser.add_argument("--backend", default="cpu", metavar="NAME", help="dry-run: whose kernels")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="measure: of each step")
    parser.add_argument("--out", metavar="FILE", help="measure: this machine as a --cluster")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="plans shown")
    parser.add_argument("--explain", action="store_true", help="every formula with its source")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit 0, 1 where no plan fits or the validation fails, 2 usage."""
    actions = {
        "search": run_search,
        "validate": run_validate,
        "slides": run_slides,
        "inference": run_inference,
        "dry-run": run_dry,
        "measure": run_measure,
    }
    for name, size in (SMALL if args.action == "measure" else PUBLISHED).items():
        if getattr(args, name) is None:
            setattr(args, name, size)
    return actions[args.action](args)


def run_search(args: argparse.Namespace) -> int:
    """The fastest plans; exit 1 where none fits, with the one that misses by least."""
    from glm_core.errors import ConfigError
    from glm_core.model.presets import preset
    from glm_core.planner import cluster, search
    from glm_core.planner.cost import Work, stages

    where = cluster.load(args.cluster) if args.cluster else cluster.preset(args.chip, args.chips)
    for name in ("tokens", "global_batch", "seq", "top"):
        if getattr(args, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(args, name)} must be positive")
    work = Work(model=preset(args.preset), seq=args.seq, fused_attention=not args.unfused_attention)
    told = {k: getattr(args, k) for k in (*FIXED, "recompute", "sp")}
    fixed = {k: v for k, v in told.items() if v is not None}
    budget = search.Budget(tokens=args.tokens, days=args.days, energy_mwh=args.energy)
    found = search.search(work, where, args.global_batch, budget, fixed, args.stack)
    nearest = None
    if not found.feasible and fixed:
        others = search.search(work, where, args.global_batch, budget, {}, args.stack)
        nearest = search.nearest_feasible(fixed, others.feasible)
    told = outcome_json(found, where, nearest, args.top)
    told["efficiency"] = efficiency_of(found, where, args.stack)
    if found.feasible:
        told["stages"] = stages(found.feasible[0].plan, work)
    emit(args, told, text_of(args, found, where, nearest))
    return 0 if found.feasible else EXIT_FAILED


def outcome_json(
    found: Outcome, where: Cluster, nearest: Candidate | None, top: int
) -> dict[str, Any]:
    """The machine-readable result."""
    return {
        "cluster": {"name": where.name, "chips": where.chips, "source": where.source},
        "plans": [c.to_json() for c in found.feasible[:top]],
        "feasible": len(found.feasible),
        "rejected": dict(found.rejected),
        "least_missing": _missing(found),
        "nearest_feasible": nearest.to_json() if nearest else None,
    }


def efficiency_of(found: Outcome, where: Cluster, stack: str) -> dict[str, dict[str, Any]]:
    """The fitted factors behind the predictions, by stack, with the runs they come from."""
    from glm_core.planner.efficiency import fitted, stack_of

    stacks = {stack or stack_of(c.plan) for c in found.feasible}
    return {s: asdict(fitted(where.family, s)) for s in sorted(stacks)}


def _missing(found: Outcome) -> dict[str, Any] | None:
    if found.nearest is None:
        return None
    closest, reasons = found.nearest
    return {"plan": closest.plan.label(), "reasons": reasons}


def text_of(
    args: argparse.Namespace, found: Outcome, where: Cluster, nearest: Candidate | None
) -> str:
    """Tables for people."""
    rows = [["plan", "GB a chip", "step s", "bubble", "MFU", "HFU", "days", "MWh"]]
    rows += [_row(c) for c in found.feasible[: args.top]]
    lines = [f"{args.preset} on {where.chips} x {where.name}: {len(found.feasible)} plans fit"]
    lines += [columns(rows), *_parts(found.feasible[0])] if found.feasible else []
    counts = ", ".join(f"{kind} {n}" for kind, n in found.rejected.most_common())
    lines += [f"rejected: {counts or 'none'}"]
    missing = _missing(found)
    if missing and not found.feasible:
        lines += [f"misses by least: {missing['plan']}: {'; '.join(missing['reasons'])}"]
    if not found.feasible:
        fits = columns([rows[0], _row(nearest)]) if nearest else "no other plan fits either"
        lines += ["nearest that fits:", fits]
    lines += [f"{where.name}: {where.source}"]
    for stack, factors in efficiency_of(found, where, args.stack).items():
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
    """Exit 1 where the median error of held-out rows exceeds 10 %, or a miss is not explained."""
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
    for family, found in report["families"].items():
        lines += [
            f"{family}: median |error| {found['median_abs_error']:.1%} over "
            f"{found['held_out']} held-out rows"
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
    """Always 0."""
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
    """Weights and cache of one sequence on each card, row-wise int8 and int4; exit 0."""
    from glm_core.model.presets import preset
    from glm_core.model.quantize import Quantization, device_memory

    model, told = preset(args.preset), list[dict[str, Any]]()
    for bits in (8, 4):
        for cards, room, name in CARDS:
            memory = device_memory(model, Quantization(bits=bits), cards, args.seq)
            told.append(
                {
                    "bits": bits,
                    "cards": cards,
                    "card": name,
                    "card_gib": room,
                    "weights_bytes": memory.weights,
                    "cache_bytes": memory.cache,
                    "fits": memory.total < room << 30,
                }
            )
    head = ["weights", "cards", "weights GiB", "cache GiB", "fits"]
    gib = [[f"{r[k] / 2**30:.2f}" for k in ("weights_bytes", "cache_bytes")] for r in told]
    rows = [
        [
            f"int{r['bits']}",
            f"{r['cards']} x {r['card']} {r['card_gib']}G",
            *sizes,
            "yes" if r["fits"] else "no",
        ]
        for r, sizes in zip(told, gib, strict=True)
    ]
    note = "per card, one sequence, without activations and the runtime's own memory"
    facts = {"preset": args.preset, "length": args.seq, "rows": told, "counts": note}
    emit(args, facts, f"{columns([head, *rows])}\n{note}")
    return 0


def run_dry(args: argparse.Namespace) -> int:
    """Exit 1 where the rank needs more memory than the chip has, 2 where a cluster would refuse."""
    from glm_core.backends.registry import usable
    from glm_core.config import DataConfig, RunConfig, TrainConfig
    from glm_core.distributed import dry_run
    from glm_core.distributed.plan import parse
    from glm_core.errors import ConfigError
    from glm_core.model.presets import preset
    from glm_core.planner import cluster
    from glm_core.planner import rank as own

    if not args.plan:
        raise ConfigError("plan dry-run: no plan; pass --plan tp=4,pp=8,dp=24,micro_batches=176")
    chip = cluster.load(args.cluster) if args.cluster else cluster.preset(args.chip, args.chips)
    plan, model = parse(args.plan), preset(args.preset)
    config = RunConfig(
        model=model,
        data=DataConfig(length=args.seq, vocab=min(DataConfig().vocab, model.vocab)),
        train=TrainConfig(
            global_batch=args.global_batch, micro_batch=1, dtype="bfloat16", backend=args.backend
        ),
    )
    found = dry_run.run(config, plan, args.rank, usable(args.backend))
    job = own.predict(model, plan, args.rank, args.seq, args.global_batch)
    told = asdict(found) | {
        "plan": plan.label(),
        "backend": args.backend,
        "chip_bytes": chip.memory,
        "predicted_memory": own.memory(job),
        "predicted_collectives": own.collectives(job),
    }
    told["predicted_peak_bytes"] = sum(told["predicted_memory"].values())
    told["fits"] = found.peak_bytes <= chip.memory
    emit(args, told, dry_text(told, chip.name))
    return 0 if told["fits"] else EXIT_FAILED


def dry_text(told: dict[str, Any], chip: str) -> str:
    """For people: place, memory, messages, what is held."""
    place = ", ".join(f"{axis} {n}" for axis, n in told["place"].items())
    peak, predicted, room = (
        told[k] / 1e9 for k in ("peak_bytes", "predicted_peak_bytes", "chip_bytes")
    )
    memory = ", ".join(f"{k} {v / 1e9:.2f}" for k, v in told["memory"].items() if v)
    rows = [["collective", "count", "bytes", "predicted count", "predicted bytes"]]
    for name, real in told["collectives"].items():
        guess = told["predicted_collectives"].get(name, {"count": 0, "bytes": 0})
        rows.append([name, *(str(d[k]) for d in (real, guess) for k in ("count", "bytes"))])
    held = [["parameter", "shape", "of the whole"]] + [
        [n, "x".join(map(str, shape)), told["placement"][n]]
        for n, shape in told["parameters"].items()
    ]
    fits = "fits" if told["fits"] else f"does not fit: {peak - room:.2f} GB more than {room:.0f} GB"
    return "\n".join(
        [
            columns(held),
            columns(rows),
            f"rank {told['rank']} ({place}) of {told['plan']}",
            f"peak {peak:.3f} GB, predicted {predicted:.3f} GB ({predicted / peak - 1:+.2%}); "
            f"{memory}",
            f"{chip}: {fits}; {told['seconds']:.1f} s",
        ]
    )


def run_measure(args: argparse.Namespace) -> int:
    """Always 0: what this machine reaches, the steps that follow from it, then the steps."""
    import sys

    from glm_core.bench import plan_steps
    from glm_core.errors import ConfigError
    from glm_core.measure.timing import machine
    from glm_core.model.presets import preset
    from glm_core.planner import this_machine

    if args.rounds < 1:
        raise ConfigError(f"--rounds={args.rounds} must be at least 1")
    model = preset(args.preset)
    wanted = this_machine.Timings(
        preset=args.preset,
        processes=2,
        length=args.seq,
        global_batch=args.global_batch,
        rounds=args.rounds,
    )
    chosen = this_machine.checked_plans(
        [args.plan] if args.plan else this_machine.PLANS, model, wanted
    )
    first = plan_steps.measure(
        replace(wanted, alone=this_machine.steps_alone(model), messages=True)
    )
    at = this_machine.calibrated(first, model, args.seq)
    if args.out:
        this_machine.write_cluster(args.out, at, machine(), wanted.processes)
    forecast = {
        text: this_machine.predicted(at, model, plan, args.seq, args.global_batch)
        for text, plan in chosen.items()
    }
    for text, parts in forecast.items():
        print(f"predicted: {text}: {sum(parts.values()):.3f} s", file=sys.stderr)
    again = replace(wanted, alone=this_machine.steps_alone(model)[:2], plans=tuple(chosen))
    report = this_machine.report(at, forecast, first, plan_steps.measure(again))
    emit(args, report | {"machine": machine()}, measured_text(report))
    return 0


def measured_text(report: dict[str, Any]) -> str:
    """For people: the factors, then a line a plan."""
    rows = [["plan", "predicted s", "measured s", "error", "less drift", "largest parts"]]
    for r in report["rows"]:
        parts = sorted(r["parts_s"].items(), key=lambda item: -item[1])[:3]
        rows.append(
            [
                r["plan"],
                f"{r['predicted_step_s']:.3f}",
                f"{r['measured_step_s']:.3f}",
                f"{r['error']:+.1%}",
                f"{r['error_without_drift']:+.1%}",
                ", ".join(f"{k} {v:.3f}" for k, v in parts),
            ]
        )
    factors = ", ".join(f"{k} {v:.3g}" for k, v in report["factors"].items())
    return "\n".join(
        [
            columns(rows),
            f"median |error| {report['median_abs_error']:.1%}, less drift "
            f"{report['median_abs_error_without_drift']:.1%}; steps alone took "
            f"{report['drift']:.2f} times as long during the measurement as before it",
            f"peak {report['peak_gflops']:.0f} GFLOP/s and read {report['read_gb_s']:.1f} GB/s a "
            f"process, all at once; seconds for each nominal one: {factors}",
        ]
    )
