"""`glm-core ops`: prints the table of ops x backends from the registry itself."""

from __future__ import annotations

import argparse

from glm_core.cli.options import add_json, columns, emit


def define(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("op", nargs="?", help="show one op only, with its documentation")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table and exits 0; raises GlmCoreError for an unknown op."""
    from glm_core.backends import registry
    from glm_core.errors import GlmCoreError, unknown
    from glm_core.ops import all_ops

    table = registry.table()
    if args.op and args.op not in table:
        raise GlmCoreError(unknown("op", args.op, table))
    chosen = {op: cells for op, cells in table.items() if args.op in (None, op)}
    ops = [
        {"name": op, "doc": all_ops()[op].doc, "backends": cells} for op, cells in chosen.items()
    ]
    names = registry.names()
    rows = [["op", *names]] + [
        [op, *(cells[n].partition(":")[0] for n in names)] for op, cells in chosen.items()
    ]
    reasons = {
        f"{n}: {c[n]}" for c in chosen.values() for n in names if c[n].startswith("unsupported")
    }
    text = "\n".join([columns(rows), *sorted(reasons)])
    emit(args, {"ops": ops}, f"{all_ops()[args.op].doc}\n\n{text}" if args.op else text)
    return 0
