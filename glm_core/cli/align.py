"""Implements `glm-core align`: judges loss curves across backends and machines, names the guilty
op, and measures how sharp the verdict is."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from glm_core.cli.exits import EXIT_FAILED
from glm_core.cli.options import (
    RESET,
    add_json,
    add_run,
    add_timeout,
    columns,
    emit,
    run_config,
    run_words,
)

if TYPE_CHECKING:
    from glm_core.align import Pair
    from glm_core.config import Dtype, RunConfig

STEPS = 100
"""steps of a run where neither --steps nor --config gives them: enough for the loss to flatten"""
TARGET = 0.95
"""`bisect` must name the op of at least this share of the planted bugs"""
DIRECTIONS = ("forward", "backward", "optimizer")
DTYPES = ("float32", "bfloat16", "float16")
DTYPE = "working dtype (default %(default)s)"
CONTROLS = "control runs of the reference (default %(default)s)"


def define(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommands."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    run = actions.add_parser(
        "run",
        help="train on every usable backend, judge each against the reference, write a report",
    )
    add_run(run)
    run.add_argument(
        "--backends", metavar="A,B", help="backends to judge (default: every usable one)"
    )
    run.add_argument(
        "--dtypes",
        metavar="A,B",
        default="float32,bfloat16",
        help="working dtypes (default %(default)s)",
    )
    run.add_argument("--controls", type=int, default=8, metavar="K", help=CONTROLS)
    run.add_argument(
        "--out",
        default="runs/align",
        metavar="DIR",
        help="folder for traces and report (default %(default)s)",
    )
    run.set_defaults(run=run_all)
    record = actions.add_parser("record", help="write one backend's trace to one portable file")
    add_run(record)
    record.add_argument("--backend", required=True, metavar="NAME", help="backend to record")
    record.add_argument("--dtype", choices=DTYPES, default="float32", help=DTYPE)
    record.add_argument("--controls", type=int, default=8, metavar="K", help=CONTROLS)
    record.add_argument("--out", required=True, metavar="FILE", help="trace file to write")
    record.set_defaults(run=run_record)
    compare = actions.add_parser(
        "compare", help="judge one trace file against another; needs neither device nor model"
    )
    compare.add_argument("reference", metavar="REFERENCE", help="trace of the reference")
    compare.add_argument("candidate", metavar="CANDIDATE", help="trace of the candidate")
    compare.add_argument("--report", metavar="FILE", help="HTML report to write")
    compare.set_defaults(run=run_compare)
    witness = actions.add_parser(
        "witness", help="judge the op calls in a witness file again; needs no device"
    )
    witness.add_argument("file", metavar="FILE", help="witness file of glm-core doctor --hardware")
    witness.set_defaults(run=run_witness)
    sensitivity = actions.add_parser(
        "sensitivity", help="measure the verdict: how many planted bugs it finds, and false alarms"
    )
    sensitivity.add_argument("--dtype", choices=DTYPES[:2], default="float32", help=DTYPE)
    sensitivity.add_argument(
        "--bisect", action="store_true", help="count the bugs whose op bisect names"
    )
    sensitivity.set_defaults(run=run_sensitivity)
    bisect = actions.add_parser(
        "bisect", help="name the guilty op with its direction, dtype, shape and layer"
    )
    add_run(bisect)
    bisect.add_argument("--backend", required=True, metavar="NAME", help="backend to judge")
    bisect.add_argument("--dtype", choices=DTYPES, default="float32", help=DTYPE)
    bisect.add_argument("--op", default="", metavar="NAME", help="judge only calls of this op")
    bisect.add_argument(
        "--direction", default="", choices=DIRECTIONS, help="judge only this direction"
    )
    bisect.add_argument("--layer", default="", metavar="N", help="judge only calls of this block")
    bisect.add_argument(
        "--step", type=int, default=0, metavar="N", help="judge only calls of this captured step"
    )
    bisect.set_defaults(run=run_bisect)
    for action in (run, record, bisect):
        add_timeout(action)
    for action in (run, record, compare, witness, sensitivity, bisect):
        add_json(action)


def run_all(args: argparse.Namespace) -> int:
    """Runs `align run`. Returns 0 for aligned, 1 for diverged; raises where a requested backend is
    not available (exit 3)."""
    from glm_core import align
    from glm_core.align import report
    from glm_core.backends import registry

    names = args.backends.split(",") if args.backends else usable()
    for name in names:
        registry.usable(name)
    config = config_of(args)
    result = align.run(
        config,
        names,
        out_dir=args.out,
        controls=args.controls,
        dtypes=dtypes_of(args),
        progress=progress,
        timeout_s=args.timeout,
    )
    page = report.write(result, Path(args.out) / "report.html", args.command_line)
    text = f"{verdict_table(result.pairs)}\n{result.verdict}; report: {page}"
    emit(args, {**result.to_json(), "report": str(page)}, text)
    return 0 if result.verdict == "aligned" else EXIT_FAILED


def config_of(args: argparse.Namespace, **train: str) -> RunConfig:
    """Returns the config that the options describe, with STEPS steps where they give none."""
    if args.steps is None and not args.config:
        args.steps = STEPS
    return run_config(args, **train)


def dtypes_of(args: argparse.Namespace) -> list[Dtype]:
    """Returns the requested dtypes. Raises ConfigError that names the unknown ones."""
    from glm_core.errors import ConfigError, unknown

    names = args.dtypes.split(",")
    if problems := [unknown("dtype", n, DTYPES) for n in names if n not in DTYPES]:
        raise ConfigError("; ".join(problems))
    return names


def progress(what: str, done: int, of: int) -> None:
    """Shows progress in one line on stderr, which is overwritten."""
    print(f"\r{what:<40.40} {done}/{of}   ", end="" if done < of else "\n", file=sys.stderr)


def usable() -> list[str]:
    """Returns every backend that computes values here, except the reference."""
    from glm_core.backends import registry

    candidates = [n for n in registry.names() if n not in ("null", "reference")]
    return [n for n in candidates if registry.probe(n).ok]


def run_record(args: argparse.Namespace) -> int:
    """Runs `align record`. Returns 0 when the trace is written."""
    from glm_core import align
    from glm_core.diagnose import watchdog

    config = config_of(args, backend=args.backend, dtype=args.dtype)
    with watchdog.guard(args.timeout, f"align record: backend {args.backend}", RESET):
        trace = align.record(config, args.backend, controls=args.controls, progress=progress)
    trace.save(args.out)
    facts = {"trace": args.out, "backend": trace.backend, "steps": len(trace.loss)}
    facts |= {"last_loss": float(trace.loss[-1]), "seconds": trace.seconds}
    emit(args, facts, f"{args.out}: {len(trace.loss)} steps on {trace.backend}")
    return 0


def run_bisect(args: argparse.Namespace) -> int:
    """Runs `align bisect`. Returns 0 where nothing is guilty, 1 where something is named; raises
    where the backend is not available (exit 3)."""
    from glm_core import align
    from glm_core.backends import registry
    from glm_core.diagnose import watchdog

    registry.usable(args.backend)
    config = config_of(args, backend=args.backend, dtype=args.dtype)
    only = align.CallFilter(args.op, args.direction, args.layer, args.step)
    with watchdog.guard(args.timeout, f"align bisect: backend {args.backend}", RESET):
        result = align.bisect(
            config, args.backend, only=only, options=run_words(args), progress=progress
        )
    emit(args, result.to_json(), result.text())
    return EXIT_FAILED if result.guilty else 0


def run_compare(args: argparse.Namespace) -> int:
    """Runs `align compare`. Returns 0 for aligned, 1 for diverged."""
    from glm_core import align
    from glm_core.align import report
    from glm_core.align.trace import load

    reference, candidate = load(args.reference), load(args.candidate)
    pair = align.compare(reference, candidate)
    if args.report:
        report.write_pair(pair, reference, candidate, args.report, args.command_line)
    emit(args, pair.to_json(), verdict_table([pair]))
    return 0 if pair.verdict == "aligned" else EXIT_FAILED


def run_witness(args: argparse.Namespace) -> int:
    """Runs `align witness`. Returns 0 where nothing is guilty, 1 where a recorded result is."""
    import dataclasses

    from glm_core.align.witness import judge
    from glm_core.conformance import witness

    recorded = witness.load(args.file)
    findings = judge(recorded)
    guilty = [f for f in findings if f.ratio > 1]
    worst = findings[0].ratio if findings else 0.0
    facts = {
        "calls": len(recorded.calls),
        "tests": len(findings),
        "max_op_ratio": worst,
        "guilty": [dataclasses.asdict(f) for f in guilty],
    }
    summary = (
        f"{recorded.backend} on {recorded.environment.get('device', '?')}: {len(guilty)} of "
        f"{len(findings)} tests of {len(recorded.calls)} op calls guilty; largest ratio {worst:.3f}"
    )
    emit(args, facts, "\n".join([*map(str, guilty), summary]))
    return EXIT_FAILED if guilty else 0


def run_sensitivity(args: argparse.Namespace) -> int:
    """Runs `align sensitivity`. Returns 0 where every planted bug was found and nothing benign was
    convicted; with --bisect, where the ops of at least TARGET of the bugs are named."""
    from glm_core.sensitivity.detection import progress_line, sensitivity
    from glm_core.sensitivity.hitrate import hits

    if args.bisect:
        named = hits(args.dtype, progress=progress_line)
        emit(args, named.to_json(), named.text())
        return 0 if named.share >= TARGET else EXIT_FAILED
    result = sensitivity(args.dtype, progress=progress_line)
    emit(args, result.to_json(), result.text())
    return 0 if not result.missed and not result.false_alarms else EXIT_FAILED


def verdict_table(pairs: list[Pair]) -> str:
    """Returns one row per comparison; ratios are shares of what is allowed."""
    rows = [["candidate", "dtype", "verdict", "envelope", "gradients", "ops", "first step", "why"]]
    for p in pairs:
        ratios = (p.max_envelope_ratio, p.max_gradient_ratio, p.max_op_ratio)
        shares = [f"{r:.3f}" for r in ratios]
        first = str(p.first_step or "-")
        rows.append([p.candidate, p.dtype, p.verdict, *shares, first, "; ".join(p.reasons)])
    return columns(rows)
