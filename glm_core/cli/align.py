"""Implements `glm-core align`: judges loss curves across backends and machines, names the guilty
op, and measures how sharp the verdict is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glm_core.align import NUM_CONTROLS
from glm_core.cli import museum, rollout
from glm_core.cli.exits import EXIT_FAILED
from glm_core.cli.options import (
    RESET,
    add_json,
    add_run,
    add_timeout,
    columns,
    emit,
    output_file,
    output_folder,
    run_config,
    run_words,
)
from glm_core.cli.progress import ProgressLine

if TYPE_CHECKING:
    from glm_core.align import Pair
    from glm_core.align.trace import Trace
    from glm_core.config import Dtype, RunConfig

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
    run.add_argument("--controls", type=int, default=NUM_CONTROLS, metavar="K", help=CONTROLS)
    run.add_argument(
        "--without",
        action="append",
        default=[],
        choices=("curve", "ops"),
        help="leave out a slow part: the curve (with the controls, most of the time), or the "
        "gradients and ops of the captured steps",
    )
    run.add_argument(
        "--plan",
        action="append",
        default=[],
        metavar="PLAN",
        help="also train under this plan, in processes on this host, and hold it to one process: "
        "dp=2,zero=1; may be given more than once; --backends reference judges the plan alone",
    )
    run.add_argument(
        "--out",
        type=output_folder,
        default="runs/align",
        metavar="DIR",
        help="folder for traces and report (default %(default)s)",
    )
    run.set_defaults(run=run_all)
    record = actions.add_parser("record", help="write one backend's trace to one portable file")
    add_run(record)
    record.add_argument("--backend", required=True, metavar="NAME", help="backend to record")
    record.add_argument("--dtype", choices=DTYPES, default="float32", help=DTYPE)
    record.add_argument("--controls", type=int, default=NUM_CONTROLS, metavar="K", help=CONTROLS)
    record.add_argument(
        "--out", type=output_file, required=True, metavar="FILE", help="trace file to write"
    )
    record.set_defaults(run=run_record)
    compare = actions.add_parser(
        "compare", help="judge one trace file against another; needs neither device nor model"
    )
    compare.add_argument("reference", metavar="REFERENCE", help="trace of the reference")
    compare.add_argument("candidate", metavar="CANDIDATE", help="trace of the candidate")
    compare.add_argument("--report", type=output_file, metavar="FILE", help="HTML report to write")
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
    sensitivity.add_argument(
        "--honest",
        type=int,
        default=0,
        metavar="N",
        help="judge N honest candidates on small models and say how often one is called diverged",
    )
    sensitivity.add_argument(
        "--keep",
        type=output_file,
        default="",
        metavar="FILE",
        help="append each of --honest's rows to this file; a later call goes on after them",
    )
    sensitivity.set_defaults(run=run_sensitivity)
    museum.define(actions.add_parser("museum", help=museum.HELP))
    rollout.define(actions.add_parser("rollout", help=rollout.HELP))
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

    dtypes = dtypes_of(args)
    names = args.backends.split(",") if args.backends else usable(dtypes)
    result = align.run(
        config_of(args),
        names,
        out_dir=args.out,
        controls=args.controls,
        without=args.without,
        plans=args.plan,
        dtypes=dtypes,
        progress=ProgressLine(),
        timeout_s=args.timeout,
    )
    words = run_words(args)
    page = report.write(result, Path(args.out) / "report.html", args.command_line, words)
    left_out = f" (without {', '.join(args.without)})" if args.without else ""
    table = report_text(
        result.pairs, [result.trace(pair.candidate, pair.dtype) for pair in result.pairs], words
    )
    text = f"{table}\n\n{result.verdict}{left_out}; report: {page}"
    emit(args, {**result.to_json(), "report": str(page)}, text)
    return 0 if result.verdict == "aligned" else EXIT_FAILED


def config_of(args: argparse.Namespace, **train: str) -> RunConfig:
    """Returns the config that the options describe: the main job's where they do not."""
    from glm_core.align import main_job

    return run_config(args, main_job(), **train)


def dtypes_of(args: argparse.Namespace) -> list[Dtype]:
    """Returns the requested dtypes. Raises ConfigError that names the unknown ones."""
    from glm_core.errors import ConfigError, unknown

    names = args.dtypes.split(",")
    if problems := [unknown("dtype", n, DTYPES) for n in names if n not in DTYPES]:
        raise ConfigError("; ".join(problems))
    return names


def usable(dtypes: Sequence[str]) -> list[str]:
    """Returns every backend that computes values here in all of these dtypes, except the reference.
    Says on stderr which are left out because they lack a dtype."""
    from glm_core.backends import registry

    chosen = []
    for name in registry.names():
        if name in ("null", "reference") or not registry.probe(name).ok:
            continue
        held = [str(d).removeprefix("torch.") for d in registry.get(name).dtypes]
        if lacking := [d for d in dtypes if d not in held]:
            print(
                f"backend {name} is left out: it has no {', '.join(lacking)}; judge it with "
                f"--backends {name} --dtypes {','.join(held)}",
                file=sys.stderr,
            )
        else:
            chosen.append(name)
    return chosen


def run_record(args: argparse.Namespace) -> int:
    """Runs `align record`. Returns 0 when the trace is written."""
    from glm_core import align
    from glm_core.diagnose import watchdog

    config = config_of(args, backend=args.backend, dtype=args.dtype)
    with watchdog.guard(args.timeout, f"align record: backend {args.backend}", RESET):
        trace = align.record(config, args.backend, controls=args.controls, progress=ProgressLine())
    trace.save(args.out)
    facts = {"trace": args.out, "backend": trace.backend, "steps": len(trace.loss)}
    facts |= {"last_loss": float(trace.loss[-1]), "seconds": trace.seconds}
    emit(args, facts, f"{args.out}: {len(trace.loss)} steps on {trace.backend}")
    return 0


def run_bisect(args: argparse.Namespace) -> int:
    """Runs `align bisect`. Returns 0 where nothing is guilty, 1 where something is named; raises
    where the backend is not available (exit 3)."""
    from glm_core import align
    from glm_core.diagnose import watchdog

    config = config_of(args, backend=args.backend, dtype=args.dtype)
    only = align.CallFilter(args.op, args.direction, args.layer, args.step)
    with watchdog.guard(args.timeout, f"align bisect: backend {args.backend}", RESET):
        result = align.bisect(
            config, args.backend, only=only, options=run_words(args), progress=ProgressLine()
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
    emit(args, pair.to_json(), report_text([pair], [candidate]))
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
    from glm_core.sensitivity.detection import Row, sensitivity
    from glm_core.sensitivity.hitrate import hits

    line = ProgressLine()

    def show(done: int, of: int, row: Row) -> None:
        verdict = "diverged" if row.convicted else "aligned"
        line(f"{row.name} {verdict}", done, of, part=row.op or row.kind)

    if args.honest:
        from glm_core.sensitivity.honest import false_alarms

        honest = false_alarms(args.honest, kept=args.keep, progress=show)
        emit(args, honest.to_json(), honest.text())
        return EXIT_FAILED if any(r.convicted for r in honest.judged) else 0
    if args.bisect:
        named = hits(args.dtype, progress=show)
        emit(args, named.to_json(), named.text())
        return 0 if named.share >= TARGET else EXIT_FAILED
    result = sensitivity(args.dtype, progress=show)
    emit(args, result.to_json(), result.text())
    return 0 if not result.missed and not result.false_alarms else EXIT_FAILED


def report_text(
    pairs: Sequence[Pair], traces: Sequence[Trace], options: Sequence[str] | None = None
) -> str:
    """Returns the outcome in one sentence, a table with a row per comparison, and for each that
    diverged what to do about it. Ratios are shares of what honest rounding explains; `-` was not
    judged. `traces` are the candidates', `options` what the command line says about the run."""
    from glm_core.align import explanation

    rows = [["candidate", "dtype", "verdict", "curve", "gradients", "ops", "first step"]]
    details = []
    for pair, trace in zip(pairs, traces, strict=True):
        ratios = explanation.shares(pair, trace)
        shares = ["-" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
        rows.append(
            [pair.candidate, pair.dtype, pair.verdict, *shares, str(pair.first_step or "-")]
        )
        if pair.reasons:
            found = explanation.details(pair, trace, options)
            details += ["", f"{explanation.sentence(pair)}:"]
            details += [f"  {label + ':':17} {text}" for label, text in found]
    note = "(curve, gradients, ops: largest deviation as a share of what honest rounding explains)"
    return "\n".join([explanation.headline(pairs), "", columns(rows), note, *details])
