"""Implements `glm-core conformance`: judges every op of a backend against the float64 reference,
case by case."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_core.cli.exits import EXIT_FAILED
from glm_core.cli.options import add_json, add_timeout, emit, output_file
from glm_core.cli.progress import ProgressLine

if TYPE_CHECKING:
    from glm_core.conformance.report import Report
    from glm_core.conformance.run import Progress

MODES = ("test", "grad", "perf", "support")


def define(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "action",
        nargs="?",
        choices=["mutants"],
        help="run the cases on wrong kernels: do they reject them all?",
    )
    parser.add_argument("--backend", metavar="NAME", help="backend to judge")
    parser.add_argument(
        "--record",
        type=output_file,
        metavar="FILE",
        help="witness file to write: what the device computed",
    )
    parser.add_argument(
        "--witness", metavar="FILE", help="judge the results in this file; needs no device"
    )
    parser.add_argument(
        "--mode",
        action="append",
        choices=MODES,
        help="which cases to run; may be repeated (default: test and grad)",
    )
    parser.add_argument(
        "--decode",
        action="store_true",
        help="judge the backend's whole decode steps instead: do they give the bits of its ops?",
    )
    parser.add_argument("--op", metavar="NAME", help="run only the cases of this op")
    parser.add_argument("--id", metavar="ID", help="run only this case; a pattern may contain *")
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="ID",
        help="leave this case out; a pattern may contain *; may be repeated",
    )
    parser.add_argument(
        "--known-failures",
        metavar="FILE",
        help="file of cases known to fail: a case id and the reason per line",
    )
    parser.add_argument(
        "--junit", type=output_file, metavar="FILE", help="JUnit XML report to write"
    )
    parser.add_argument("--html", type=output_file, metavar="FILE", help="HTML report to write")
    parser.add_argument(
        "--github", action="store_true", help="print GitHub annotations for failed cases"
    )
    add_timeout(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command. Returns 0 where every case passed, 1 where a case failed or a mutant
    survived; raises for wrong usage (exit 2) and a backend that is not available (exit 3)."""
    from glm_core.conformance import mutants, render
    from glm_core.errors import GlmCoreError

    if args.action == "mutants":
        killed = mutants.mutants(args.op, progress=show_progress())
        emit(args, killed.to_json(), killed.text())
        return EXIT_FAILED if killed.survivors else 0
    if not (args.backend or args.witness):
        raise GlmCoreError(
            "conformance: no backend named; pass --backend NAME (glm-core devices lists them) or "
            "--witness FILE"
        )
    if args.witness and (args.backend or args.record):
        raise GlmCoreError(
            "conformance: --witness judges what was recorded; leave out --backend and --record"
        )
    if args.decode:
        report = _judge_decode_steps(args)
    else:
        report = _judge_witness(args) if args.witness else _run_on_backend(args)
    for path, write in ((args.junit, render.junit), (args.html, render.page)):
        if path:
            Path(path).write_text(write(report), encoding="utf-8")
    text = render.text(report)
    notes = render.github(report) if args.github else ""
    emit(args, report.to_json(), "\n".join(filter(None, (notes, text))))
    return 0 if report.ok else EXIT_FAILED


def show_progress() -> Progress:
    """Returns a function that shows which case runs; a log gets one line for each op."""
    line = ProgressLine()

    def show(number: int, total: int, id: str) -> None:
        line(id, number, total, part=id.partition("-")[0] or "done")

    return show


def _filters(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that select cases, as arguments of `run` and `rejudge`."""
    return {
        "mode": args.mode or ("test", "grad"),
        "op": args.op,
        "id": args.id,
        "skip": args.skip,
        "known_failures": args.known_failures,
        "progress": show_progress(),
    }


def _run_on_backend(args: argparse.Namespace) -> Report:
    """Runs the cases on the backend, and writes the witness of --record."""
    from glm_core.backends import registry
    from glm_core.conformance import witness
    from glm_core.conformance.run import run as run_cases

    backend = registry.usable(args.backend)
    recorded = witness.new(backend)
    keep = recorded.keep if args.record else None
    report = run_cases(backend, **_filters(args), timeout_s=args.timeout, keep=keep)
    if args.record:
        recorded.keep_unsupported(report)
        recorded.save(args.record)
    return report


def _judge_decode_steps(args: argparse.Namespace) -> Report:
    """Judges the backend's whole decode steps."""
    from glm_core.backends import registry
    from glm_core.conformance import decode
    from glm_core.errors import GlmCoreError

    for option in ("witness", "record", "op", "mode", "known_failures"):
        if vars(args)[option]:
            name = option.replace("_", "-")
            raise GlmCoreError(f"conformance --decode: takes no --{name}; choose by --id")
    backend = registry.usable(args.backend)
    return decode.run(backend, id=args.id, skip=args.skip, progress=show_progress())


def _judge_witness(args: argparse.Namespace) -> Report:
    """Judges the cases in the witness file."""
    from glm_core.conformance import witness
    from glm_core.conformance.rejudge import rejudge

    return rejudge(witness.load(args.witness), args.witness, **_filters(args))
