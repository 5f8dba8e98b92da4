"""Implements `glm-core align museum`: mistakes that people shipped, found and named or missed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from glm_core.cli.exits import EXIT_FAILED
from glm_core.cli.options import add_json, emit
from glm_core.cli.progress import ProgressLine

if TYPE_CHECKING:
    from glm_core.sensitivity.museum import Row

HELP = "judge mistakes that public reports describe: what is found, and what is missed"


def define(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="judge only this exhibit"
    )
    parser.add_argument(
        "--many", action="store_true", help="judge the exhibits of many processes instead"
    )
    parser.add_argument(
        "--held-out",
        action="store_true",
        help="judge the quarter that is held out by a hash of the name; meant for a last check",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        metavar="N",
        help="processes at work (default %(default)s)",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs `align museum`. Returns 0 where enough exhibits are found and named, and nothing benign
    is convicted."""
    from glm_core.sensitivity.museum import museum

    progress = ProgressLine()

    def show(done: int, of: int, row: Row) -> None:
        verdict = f"found by {row.by}" if row.convicted else "acquitted"
        progress(f"{row.name} {verdict}", done, of, part=row.kind)

    result = museum(
        many=args.many,
        held_out=args.held_out,
        only=args.only,
        processes=args.processes,
        progress=show,
    )
    emit(args, result.to_json(), result.text())
    return 0 if result.reached else EXIT_FAILED
