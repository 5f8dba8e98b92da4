"""`glm-core align`: one verdict on loss curves across backends, machines and planted bugs."""

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
    words,
)

if TYPE_CHECKING:
    from glm_core.align import Pair
    from glm_core.config import Dtype, RunConfig

STEPS = 100
"""of `run` and `record` where neither --steps nor --config says: the curve is past its knee"""
TARGET = 0.95
"""share of the planted bugs whose op `bisect` must name"""
DIRECTIONS = ("forward", "backward", "optimizer")
DTYPES = ("float32", "bfloat16", "float16")


def define(parser: argparse.ArgumentParser) -> None:
    """Its subcommands."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    run = actions.add_parser("run", help="train on every usable backend, compare, report")
    add_run(run)
    run.add_argument("--backends", metavar="A,B", help="default: every usable one")
    run.add_argument(
        "--dtypes", metavar="A,B", default="float32,bfloat16", help="default %(default)s"
    )
    run.add_argument(
        "--controls", type=int, default=8, metavar="K", help="control runs (default 8)"
    )
    run.add_argument("--out", default="runs/align", metavar="DIR", help="default %(default)s")
    run.set_defaults(run=run_all)
    record = actions.add_parser("record", help="one backend's trace into one portable file")
    add_run(record)
    record.add_argument("--backend", required=True, metavar="NAME")
    record.add_argument("--dtype", choices=DTYPES, default="float32", help="default %(default)s")
    record.add_argument(
        "--controls", type=int, default=8, metavar="K", help="control runs (default 8)"
    )
    record.add_argument("--out", required=True, metavar="FILE", help="the trace")
    record.set_defaults(run=run_record)
    compare = actions.add_parser("compare", help="two trace files; needs neither device nor model")
    compare.add_argument("reference", metavar="REFERENCE")
    compare.add_argument("candidate", metavar="CANDIDATE")
    compare.add_argument("--report", metavar="FILE", help="HTML report")
    compare.set_defaults(run=run_compare)
    sensitivity = actions.add_parser("sensitivity", help="planted bugs and benign changes, judged")
    sensitivity.add_argument(
        "--dtype", choices=DTYPES[:2], default="float32", help="default %(default)s"
    )
    sensitivity.add_argument(
        "--bisect", action="store_true", help="does bisect name each bug's op?"
    )
    sensitivity.set_defaults(run=run_sensitivity)
    bisect = actions.add_parser("bisect", help="which op, direction, dtype, shape and layer")
    add_run(bisect)
    bisect.add_argument("--backend", required=True, metavar="NAME", help="the candidate")
    bisect.add_argument("--dtype", choices=DTYPES, default="float32", help="default %(default)s")
    bisect.add_argument("--op", default="", metavar="NAME", help="its captured calls alone")
    bisect.add_argument("--direction", default="", choices=DIRECTIONS, help="this one alone")
    bisect.add_argument("--layer", default="", metavar="N", help="calls of this block alone")
    bisect.add_argument("--step", type=int, default=0, metavar="N", help="this captured step alone")
    bisect.set_defaults(run=run_bisect)
    for action in (run, record, bisect):
        add_timeout(action)
    for action in (run, record, compare, sensitivity, bisect):
        add_json(action)


def run_all(args: argparse.Namespace) -> int:
    """Exit 0 aligned, 1 diverged, 3 a backend that was asked for is not available."""
    from glm_core import align
    from glm_core.align import report
    from glm_core.backends import registry

    names = args.backends.split(",") if args.backends else usable()
    for name in names:
        registry.usable(name)
    config = chosen(args)
    result = align.run(
        config,
        names,
        out_dir=args.out,
        controls=args.controls,
        dtypes=dtypes_of(args),
        progress=progress,
        timeout_s=args.timeout,
    )
    page = report.write(result, Path(args.out) / "report.html")
    text = f"{verdict_table(result.pairs)}\n{result.verdict}; report: {page}"
    emit(args, {**result.to_json(), "report": str(page)}, text)
    return 0 if result.verdict == "aligned" else EXIT_FAILED


def chosen(args: argparse.Namespace, **train: str) -> RunConfig:
    """The options' run, with this command's own number of steps where they name none."""
    if args.steps is None and not args.config:
        args.steps = STEPS
    return run_config(args, **train)


def dtypes_of(args: argparse.Namespace) -> list[Dtype]:
    """The dtypes asked for. Raises ConfigError naming one that is none."""
    from glm_core.errors import ConfigError, unknown

    names = args.dtypes.split(",")
    if strange := [unknown("dtype", n, DTYPES) for n in names if n not in DTYPES]:
        raise ConfigError("; ".join(strange))
    return names


def progress(what: str, done: int, of: int) -> None:
    """One line on stderr, overwritten."""
    print(f"\r{what:<40.40} {done}/{of}   ", end="" if done < of else "\n", file=sys.stderr)


def usable() -> list[str]:
    """Every backend that computes values here, apart from the reference itself."""
    from glm_core.backends import registry

    candidates = [n for n in registry.names() if n not in ("null", "reference")]
    return [n for n in candidates if registry.probe(n).ok]


def run_record(args: argparse.Namespace) -> int:
    """Exit 0 with the trace written."""
    from glm_core import align
    from glm_core.diagnose import watchdog

    config = chosen(args, backend=args.backend, dtype=args.dtype)
    with watchdog.guard(args.timeout, f"align record: backend {args.backend}", RESET):
        trace = align.record(config, args.backend, controls=args.controls, progress=progress)
    trace.save(args.out)
    facts = {"trace": args.out, "backend": trace.backend, "steps": len(trace.loss)}
    facts |= {"last_loss": float(trace.loss[-1]), "seconds": trace.seconds}
    emit(args, facts, f"{args.out}: {len(trace.loss)} steps on {trace.backend}")
    return 0


def run_bisect(args: argparse.Namespace) -> int:
    """Exit 0 nothing is guilty, 1 something is named, 3 the backend is not available."""
    from glm_core import align
    from glm_core.backends import registry
    from glm_core.diagnose import watchdog

    registry.usable(args.backend)
    config = chosen(args, backend=args.backend, dtype=args.dtype)
    only = align.CallFilter(args.op, args.direction, args.layer, args.step)
    with watchdog.guard(args.timeout, f"align bisect: backend {args.backend}", RESET):
        found = align.bisect(
            config, args.backend, only=only, options=words(args), progress=progress
        )
    emit(args, found.to_json(), found.text())
    return EXIT_FAILED if found.guilty else 0


def run_compare(args: argparse.Namespace) -> int:
    """Exit 0 aligned, 1 diverged."""
    from glm_core import align
    from glm_core.align import report
    from glm_core.align.trace import load

    reference, candidate = load(args.reference), load(args.candidate)
    pair = align.compare(reference, candidate)
    if args.report:
        report.write_pair(pair, reference, candidate, args.report)
    emit(args, pair.to_json(), verdict_table([pair]))
    return 0 if pair.verdict == "aligned" else EXIT_FAILED


def run_sensitivity(args: argparse.Namespace) -> int:
    """Exit 0 where every planted bug was found and nothing benign was convicted; with --bisect,
    where TARGET of them are named."""
    from glm_core.sensitivity.detection import progress_line, sensitivity
    from glm_core.sensitivity.hitrate import hits

    if args.bisect:
        found = hits(args.dtype, progress=progress_line)
        emit(args, found.to_json(), found.text())
        return 0 if found.share >= TARGET else EXIT_FAILED
    result = sensitivity(args.dtype, progress=progress_line)
    emit(args, result.to_json(), result.text())
    return 0 if not result.missed and not result.false_alarms else EXIT_FAILED


def verdict_table(pairs: list[Pair]) -> str:
    """One row a comparison; ratios are shares of what is allowed."""
    rows = [["candidate", "dtype", "verdict", "envelope", "gradients", "ops", "first step", "why"]]
    for p in pairs:
        ratios = (p.max_envelope_ratio, p.max_gradient_ratio, p.max_op_ratio)
        shares = [f"{r:.3f}" for r in ratios]
        first = str(p.first_step or "-")
        rows.append([p.candidate, p.dtype, p.verdict, *shares, first, "; ".join(p.reasons)])
    return columns(rows)
