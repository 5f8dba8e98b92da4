"""Runs the actions of `glm-core plan` on steps of our own trainer: dry-run and measure."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from glm_core.cli.exits import EXIT_FAILED
from glm_core.cli.options import columns, emit

if TYPE_CHECKING:
    from glm_core.config import ModelConfig
    from glm_core.distributed.plan import Plan


def run_dry(args: argparse.Namespace) -> int:
    """Does one rank's step without memory and prints what it takes, for a dense model next to the
    prediction. Exits 1 where the rank needs more memory than the chip has, 2 where a real rank
    would fail."""
    from glm_core.backends.registry import usable
    from glm_core.config import DataConfig, RunConfig, TrainConfig
    from glm_core.distributed import dry_run
    from glm_core.distributed.plan import parse
    from glm_core.errors import ConfigError
    from glm_core.model.presets import preset
    from glm_core.planner import cluster

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
    report = dry_run.run(config, plan, args.rank, usable(args.backend))
    fits = report.peak_bytes <= chip.memory
    result = asdict(report) | {
        "plan": plan.label(),
        "backend": args.backend,
        "chip_bytes": chip.memory,
        "fits": fits,
        **_prediction(args, plan, model),
    }
    emit(args, result, dry_text(result, chip.name))
    return 0 if fits else EXIT_FAILED


def _prediction(args: argparse.Namespace, plan: Plan, model: ModelConfig) -> dict[str, Any]:
    """Returns what the planner predicts for the rank; nulls where it knows no such model."""
    from glm_core.errors import ConfigError
    from glm_core.planner import rank_memory, rank_messages
    from glm_core.planner.rank import planned_rank

    try:
        rank = planned_rank(model, plan, args.rank, args.seq, args.global_batch)
    except ConfigError as error:
        print(error, file=sys.stderr)
        keys = ("predicted_memory", "predicted_collectives", "predicted_peak_bytes")
        return dict.fromkeys(keys)
    memory = rank_memory.memory(rank)
    return {
        "predicted_memory": memory,
        "predicted_collectives": rank_messages.collectives(rank),
        "predicted_peak_bytes": sum(memory.values()),
    }


def dry_text(result: dict[str, Any], chip: str) -> str:
    """Returns tables for people: parameters, messages, the rank's place, memory."""
    place = ", ".join(f"{axis} {n}" for axis, n in result["place"].items())
    peak, room = result["peak_bytes"] / 1e9, result["chip_bytes"] / 1e9
    predicted = ""
    if result["predicted_peak_bytes"] is not None:
        forecast_gb = result["predicted_peak_bytes"] / 1e9
        predicted = f", predicted {forecast_gb:.3f} GB ({forecast_gb / peak - 1:+.2%})"
    memory = ", ".join(f"{k} {v / 1e9:.2f}" for k, v in result["memory"].items() if v)
    messages = [["collective", "count", "bytes", "predicted count", "predicted bytes"]]
    for name, real in result["collectives"].items():
        forecasts = result["predicted_collectives"]
        unknown = {"count": "-", "bytes": "-"}
        forecast = unknown if forecasts is None else forecasts.get(name, dict.fromkeys(unknown, 0))
        messages.append([name, *(str(d[k]) for d in (real, forecast) for k in ("count", "bytes"))])
    parameters = [["parameter", "shape", "of the whole"]] + [
        [n, "x".join(map(str, shape)), result["placement"][n]]
        for n, shape in result["parameters"].items()
    ]
    fits = "fits"
    if not result["fits"]:
        fits = f"does not fit: {peak - room:.2f} GB more than {room:.0f} GB"
    return "\n".join(
        [
            columns(parameters),
            columns(messages),
            f"rank {result['rank']} ({place}) of {result['plan']}",
            f"peak {peak:.3f} GB{predicted}; {memory}",
            f"{chip}: {fits}; {result['seconds']:.1f} s",
        ]
    )


def run_measure(args: argparse.Namespace) -> int:
    """Measures this machine, prints the steps that follow from it, then measures the steps. Exits
    0."""
    from glm_core.bench import plan_steps
    from glm_core.errors import ConfigError
    from glm_core.measure.timing import machine
    from glm_core.model.presets import preset
    from glm_core.planner import this_machine

    if args.rounds < 1:
        raise ConfigError(f"--rounds={args.rounds} must be at least 1")
    model = preset(args.preset)
    timings = this_machine.Timings(
        preset=args.preset,
        processes=2,
        length=args.seq,
        global_batch=args.global_batch,
        rounds=args.rounds,
    )
    texts = [args.plan] if args.plan else _default_plans()
    plans = this_machine.checked_plans(texts, model, timings)
    alone = this_machine.steps_alone(model)
    before = plan_steps.measure(replace(timings, alone=alone, messages=True))
    calibrated = this_machine.calibrated(before, model, args.seq)
    if args.out:
        this_machine.write_cluster(args.out, calibrated, machine(), timings.processes)
    forecast = {
        text: this_machine.predicted(calibrated, model, plan, args.seq, args.global_batch)
        for text, plan in plans.items()
    }
    for text, parts in forecast.items():
        print(f"predicted: {text}: {sum(parts.values()):.3f} s", file=sys.stderr)
    during = plan_steps.measure(replace(timings, alone=alone[:2], plans=tuple(plans)))
    report = this_machine.report(calibrated, forecast, before, during)
    emit(args, report | {"machine": machine()}, measured_text(report))
    return 0


def _default_plans() -> list[str]:
    """Returns the plans that are measured by default; names those for which torch is too old."""
    from glm_core.distributed.plan import lacks, parse
    from glm_core.planner.this_machine import PLANS

    missing = {text: lacks(parse(text)) for text in PLANS}
    for text, lack in missing.items():
        if lack:
            print(f"left out: {text}: {'; '.join(lack)}", file=sys.stderr)
    return [text for text in PLANS if not missing[text]]


def measured_text(report: dict[str, Any]) -> str:
    """Returns a table for people, a line for each plan, with the factors below it."""
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
