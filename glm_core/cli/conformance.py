"""`glm-core conformance`: every op of a backend against the float64 reference, case by case."""

from __future__ import annotations

import argparse
from pathlib import Path

from glm_core.cli.exits import EXIT_FAILED
from glm_core.cli.options import add_json, add_timeout, emit

MODES = ("test", "grad", "perf", "support")


def define(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("action", nargs="?", choices=["mutants"], help="are the cases any good?")
    parser.add_argument("--backend", metavar="NAME", help="who is judged")
    parser.add_argument("--mode", action="append", choices=MODES, help="default: test and grad")
    parser.add_argument("--op", metavar="NAME", help="one op")
    parser.add_argument("--id", metavar="ID", help="one case, or a pattern with *")
    parser.add_argument("--known-failures", metavar="FILE", help="ids and reasons, one a line")
    parser.add_argument("--junit", metavar="FILE", help="JUnit XML")
    parser.add_argument("--html", metavar="FILE", help="HTML page")
    parser.add_argument("--github", action="store_true", help="GitHub annotations on stdout")
    add_timeout(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit 0 all passed, 1 a case failed or a mutant survived, 2 usage, 3 not available."""
    from glm_core.conformance import mutants, render
    from glm_core.conformance.run import progress_line
    from glm_core.conformance.run import run as run_cases
    from glm_core.errors import GlmCoreError

    if args.action == "mutants":
        found = mutants.mutants(args.op, progress=progress_line)
        emit(args, found.to_json(), found.text())
        return EXIT_FAILED if found.survivors else 0
    if not args.backend:
        raise GlmCoreError(
            "conformance: no backend named; pass --backend NAME (see glm-core devices)"
        )
    report = run_cases(
        args.backend,
        mode=args.mode or ("test", "grad"),
        op=args.op,
        id=args.id,
        known_failures=args.known_failures,
        progress=progress_line,
        timeout_s=args.timeout,
    )
    for path, write in ((args.junit, render.junit), (args.html, render.page)):
        if path:
            Path(path).write_text(write(report), encoding="utf-8")
    text = render.text(report)
    notes = render.github(report) if args.github else ""
    emit(args, report.to_json(), "\n".join(filter(None, (notes, text))))
    return 0 if report.ok else EXIT_FAILED
