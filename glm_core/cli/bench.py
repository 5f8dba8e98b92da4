"""`glm-core bench`: measures this machine against its ceilings, peers and a baseline."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from glm_core.cli.exits import EXIT_FAILED
from glm_core.cli.options import add_json, add_run, columns, emit, output_file, run_config

if TYPE_CHECKING:
    import torch

    from glm_core.bench.compare import Comparison
    from glm_core.measure.rows import Row

DTYPES = ("float32", "bfloat16", "float16")
MEASURES = ("auto", "time", "ratio")


def define(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommands."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    ceilings = _add_bench(actions, "ceilings", "matrix products, memory, launches, links", 15)
    ceilings.add_argument("--backend", default="cpu", metavar="NAME", help="default %(default)s")
    ceilings.add_argument("--no-links", action="store_true", help="start no processes")
    ops = _add_bench(actions, "ops", "every op under the roofline, forward and backward", 15)
    ops.add_argument("--backend", action="append", default=[], help="default: every usable one")
    ops.add_argument("--op", metavar="NAME", help="one op")
    step = _add_bench(actions, "step", "training: tokens/s, MFU, HFU, where the time goes", 12)
    add_run(step)
    step.add_argument("--backend", metavar="NAME", help="default: the run file's")
    step.add_argument(
        "--peer",
        choices=("none", "transformers", "compiled"),
        default="none",
        help="glm4-34m against transformers, eager or also compiled",
    )
    decode = _add_bench(actions, "decode", "decode token by token, against other engines", 30)
    decode.add_argument("--prefill", type=int, default=0, metavar="N", help="read N tokens instead")
    comm = _add_bench(actions, "comm", "bandwidth of the links between processes", 20)
    comm.add_argument("--backend", default="reference", metavar="NAME")
    comm.add_argument("--processes", type=int, default=2, metavar="N", help="default %(default)s")
    comm.add_argument("--max-bytes", default="16M", metavar="SIZE", help="default %(default)s")
    _add_bench(actions, "dispatch", "what dispatch adds to an op call", 15)
    compare = actions.add_parser(
        "compare", help="compare two files of rows; exit 1 where B is slower than A"
    )
    compare.add_argument("a", metavar="A")
    compare.add_argument("b", metavar="B")
    _add_comparison(compare)
    compare.add_argument(
        "--html", type=output_file, metavar="FILE", help="page with verdicts and B's rooflines"
    )
    add_json(compare)
    compare.set_defaults(run=run_compare)
    page = actions.add_parser("page", help="write files of rows as one HTML page")
    page.add_argument("files", nargs="+", metavar="FILE")
    page.add_argument("--html", type=output_file, required=True, metavar="FILE")
    page.set_defaults(run=run_page)


def _add_bench(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, rounds: int
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text)
    parser.add_argument(
        "--rounds",
        type=int,
        default=rounds,
        metavar="N",
        help="rounds measured (default %(default)s)",
    )
    parser.add_argument(
        "--dtype", action="append", choices=DTYPES, help="default: all of the backend"
    )
    parser.add_argument(
        "--out", type=output_file, metavar="FILE", help="append the rows, one JSON line each"
    )
    parser.add_argument("--html", type=output_file, metavar="FILE", help="page with rooflines")
    parser.add_argument("--baseline", metavar="FILE", help="compare with these rows")
    _add_comparison(parser)
    add_json(parser)
    parser.set_defaults(run=run_measure)
    return parser


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--by", choices=MEASURES, default="auto", help="time, or ratio to the peer")
    parser.add_argument(
        "--least",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="smallest relative change that matters (default %(default)s)",
    )


def run_measure(args: argparse.Namespace) -> int:
    """Measures and prints rows. Exits 1 where a row is slower than the baseline's or exceeds a
    limit, 2 on usage errors, 3 where the backend is not available."""
    from glm_core.bench import page
    from glm_core.bench.compare import compare
    from glm_core.errors import GlmCoreError
    from glm_core.measure import rows

    if args.rounds < 1:
        raise GlmCoreError(f"--rounds={args.rounds} must be at least 1")
    base = rows.read(args.baseline) if args.baseline else []
    measured = {
        "ceilings": _ceilings,
        "ops": _ops,
        "step": _step,
        "decode": _decode,
        "comm": _comm,
        "dispatch": _dispatch,
    }[args.action](args)
    if args.out:
        rows.append(measured, args.out)
    comparison = compare(base, measured, args.by, args.least) if base else None
    if args.html:
        page.write(measured, args.html, comparison)
    result: dict[str, Any] = {"rows": [r.to_json() for r in measured]}
    lines = [rows_text(measured)]
    if comparison:
        result["comparison"] = comparison.to_json()
        lines.append(comparison_text(comparison))
    emit(args, result, "\n".join(lines))
    exceeds_limit = any(
        r.figures.get("limit_us", 1e9) < r.figures.get("overhead_us", 0) for r in measured
    )
    return EXIT_FAILED if exceeds_limit or (comparison and comparison.regressions) else 0


def _dtypes(args: argparse.Namespace, known: tuple[torch.dtype, ...]) -> tuple[torch.dtype, ...]:
    """Returns the requested dtypes, else all that the backend has. Raises GlmCoreError where it
    lacks one."""
    import torch

    from glm_core.errors import GlmCoreError

    if not args.dtype:
        return known
    requested = tuple(getattr(torch, d) for d in dict.fromkeys(args.dtype))
    if lacking := [d for d in requested if d not in known]:
        names = ", ".join(str(d).removeprefix("torch.") for d in known)
        wrong = str(lacking[0]).removeprefix("torch.")
        raise GlmCoreError(f"--dtype {wrong}: backend {args.backend} computes in {names}")
    return requested


def _ceilings(args: argparse.Namespace) -> list[Row]:
    from glm_core.backends import registry
    from glm_core.bench import links
    from glm_core.measure import ceilings

    backend = registry.usable(args.backend)
    measured = ceilings.measure(backend, _dtypes(args, backend.dtypes), args.rounds)
    if args.no_links:
        return measured
    return [*measured, *links.measure(args.backend, 2, args.rounds, "1M")]


def _ops(args: argparse.Namespace) -> list[Row]:
    import torch

    from glm_core.bench import ops

    dtypes = tuple(getattr(torch, d) for d in args.dtype or DTYPES)
    skipped: list[str] = []
    measured = list(ops.measure(args.backend, args.op, dtypes, args.rounds, skipped.append))
    for reason in skipped:
        print(f"left out: {reason}", file=sys.stderr)
    return measured


def _step(args: argparse.Namespace) -> list[Row]:
    from glm_core.backends import registry
    from glm_core.bench import step, utilisation
    from glm_core.measure import ceilings

    config = run_config(args, backend=args.backend)
    dtypes = args.dtype or [config.train.dtype]
    if args.peer == "none":
        return [
            utilisation.measure(
                utilisation.with_dtype(config, d), args.rounds, on_text=args.data is not None
            )
            for d in dtypes
        ]
    peers = ("eager",) if args.peer == "transformers" else ("eager", "compiled")
    name = args.backend or "cpu"
    machine = ceilings.machine_with_device(registry.usable(name))
    return [r for d in dtypes for r in step.rows(d, args.rounds, peers, name, machine)]


def _decode(args: argparse.Namespace) -> list[Row]:
    from glm_core.backends import registry
    from glm_core.bench import decode
    from glm_core.errors import GlmCoreError
    from glm_core.measure import ceilings

    if args.prefill < 0:
        raise GlmCoreError(f"--prefill={args.prefill} must be at least 0")
    machine = ceilings.machine_with_device(registry.usable("cpu"))
    return decode.rows(args.rounds, args.prefill, args.dtype or list(decode.OURS), machine)


def _comm(args: argparse.Namespace) -> list[Row]:
    from glm_core.bench import links

    return links.measure(args.backend, args.processes, args.rounds, args.max_bytes)


def _dispatch(args: argparse.Namespace) -> list[Row]:
    from glm_core.backends import registry
    from glm_core.measure import ceilings

    return [
        ceilings.dispatch_row(
            args.rounds, ceilings.machine_with_device(registry.usable("reference"))
        )
    ]


def run_compare(args: argparse.Namespace) -> int:
    """Compares two files of rows. Exits 1 where a row of B is slower."""
    from glm_core.bench import page
    from glm_core.bench.compare import compare
    from glm_core.measure import rows

    a, b = rows.read(args.a), rows.read(args.b)
    comparison = compare(a, b, args.by, args.least)
    if args.html:
        page.write(b, args.html, comparison)
    emit(args, comparison.to_json(), comparison_text(comparison))
    return EXIT_FAILED if comparison.regressions else 0


def run_page(args: argparse.Namespace) -> int:
    """Writes the page and prints its path. Exits 0."""
    from glm_core.bench import page
    from glm_core.measure import rows

    print(page.write([r for f in args.files for r in rows.read(f)], args.html))
    return 0


def rows_text(rows: list[Row]) -> str:
    """Returns a table, the details of rows, the peaks and the machines."""
    from glm_core.bench.page import cells

    head = [
        "what",
        "ms",
        "spread",
        "GFLOP/s",
        "GB/s",
        "of its roof",
        "peer",
        "times as fast",
        "notes",
    ]
    lines = [columns([head, *map(cells, rows)])]
    for row in rows:
        lines += _details(row)
    lines += [f"peak: {s}" for s in dict.fromkeys(str(r.peak["source"]) for r in rows if r.peak)]
    lines += [str(m) for m in dict.fromkeys(str(dict(r.machine)) for r in rows)]
    return "\n".join(lines)


def _details(row: Row) -> list[str]:
    f = row.figures
    if row.bench == "dispatch":
        return [
            "dispatch adds {overhead_us:.2f} us a call ({low_us:.2f} to {high_us:.2f}), limit "
            "{limit_us:g}".format(**f)
        ]
    if "parts_s" not in f:
        return []
    whole = sum(f["parts_s"].values())
    parts = ", ".join(f"{k} {v * 1e3:.1f} ms ({v / whole:.0%})" for k, v in f["parts_s"].items())
    return [
        f"{row.key}: {f['tokens_s']:.0f} tokens/s, MFU {f['mfu']:.1%}, HFU {f['hfu']:.1%}, memory "
        f"{f['memory_peak_bytes'] / 2**30:.2f} GiB ({f['memory_peak_of']})",
        *f"{row.key}: {parts}".splitlines(),
        *f["formula"],
    ]


def comparison_text(comparison: Comparison) -> str:
    """Returns a table with a line for each row, then the notes."""
    head = ["what", f"{comparison.measure} B / A", "interval", "verdict"]
    rows = [
        [c.key, f"{c.ratio:.3f}", f"{c.low:.3f} to {c.high:.3f}", c.verdict]
        for c in comparison.changes
    ]
    lines = [columns([head, *rows])]
    if comparison.unmatched:
        lines.append(f"in one file only: {', '.join(comparison.unmatched)}")
    return "\n".join([*lines, *comparison.notes])
