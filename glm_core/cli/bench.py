"""`glm-core bench`: what this machine reaches, against its ceilings, peers and a baseline."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from glm_core.cli.exits import EXIT_FAILED
from glm_core.cli.options import add_json, add_run, columns, emit, run_config

if TYPE_CHECKING:
    import torch

    from glm_core.bench.compare import Comparison
    from glm_core.measure.rows import Row

DTYPES = ("float32", "bfloat16", "float16")
MEASURES = ("auto", "time", "ratio")


def define(parser: argparse.ArgumentParser) -> None:
    """Its subcommands."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    ceilings = _measuring(actions, "ceilings", "matrix products, memory, launches, links", 15)
    ceilings.add_argument("--backend", default="cpu", metavar="NAME", help="default %(default)s")
    ceilings.add_argument("--no-links", action="store_true", help="start no processes")
    ops = _measuring(actions, "ops", "every op under the roofline, forward and backward", 15)
    ops.add_argument("--backend", action="append", default=[], help="default: every usable one")
    ops.add_argument("--op", metavar="NAME", help="one op")
    step = _measuring(actions, "step", "training: tokens/s, MFU, HFU, where the time goes", 12)
    add_run(step)
    step.add_argument("--backend", metavar="NAME", help="default: the run file's")
    step.add_argument(
        "--peer",
        choices=("none", "transformers", "compiled"),
        default="none",
        help="glm4-34m against transformers, eager or also compiled",
    )
    decode = _measuring(actions, "decode", "a token after another, against other engines", 30)
    decode.add_argument("--prefill", type=int, default=0, metavar="N", help="read N tokens instead")
    comm = _measuring(actions, "comm", "what the links between processes reach", 20)
    comm.add_argument("--backend", default="reference", metavar="NAME")
    comm.add_argument("--processes", type=int, default=2, metavar="N", help="default %(default)s")
    comm.add_argument("--max-bytes", default="16M", metavar="SIZE", help="default %(default)s")
    _measuring(actions, "dispatch", "what dispatch adds to an op call", 15)
    compare = actions.add_parser("compare", help="is B slower than A? exit 1 where it is")
    compare.add_argument("a", metavar="A")
    compare.add_argument("b", metavar="B")
    _judging(compare)
    compare.add_argument("--html", metavar="FILE", help="page with verdicts and B's rooflines")
    add_json(compare)
    compare.set_defaults(run=run_compare)
    page = actions.add_parser("page", help="files of rows as one HTML page")
    page.add_argument("files", nargs="+", metavar="FILE")
    page.add_argument("--html", required=True, metavar="FILE")
    page.set_defaults(run=run_page)


def _measuring(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, rounds: int
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text)
    parser.add_argument(
        "--rounds", type=int, default=rounds, metavar="N", help="measured (default %(default)s)"
    )
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: all it has")
    parser.add_argument("--out", metavar="FILE", help="append the rows, a JSON line each")
    parser.add_argument("--html", metavar="FILE", help="page with rooflines")
    parser.add_argument("--baseline", metavar="FILE", help="judge against these rows")
    _judging(parser)
    add_json(parser)
    parser.set_defaults(run=run_measure)
    return parser


def _judging(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--by", choices=MEASURES, default="auto", help="time, or ratio to the peer")
    parser.add_argument(
        "--least",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="change that matters (default %(default)s)",
    )


def run_measure(args: argparse.Namespace) -> int:
    """Exit 0, 1 a row is slower than the baseline's or a limit is broken, 2 usage, 3 no such
    backend."""
    from glm_core.bench import page
    from glm_core.bench.compare import compare
    from glm_core.errors import GlmCoreError
    from glm_core.measure import rows

    if args.rounds < 1:
        raise GlmCoreError(f"--rounds={args.rounds} must be at least 1")
    base = rows.read(args.baseline) if args.baseline else []
    found = {
        "ceilings": _ceilings,
        "ops": _ops,
        "step": _step,
        "decode": _decode,
        "comm": _comm,
        "dispatch": _dispatch,
    }[args.action](args)
    if args.out:
        rows.append(found, args.out)
    judged = compare(base, found, args.by, args.least) if base else None
    if args.html:
        page.write(found, args.html, judged)
    told: dict[str, Any] = {"rows": [r.to_json() for r in found]}
    lines = [text_of(found)]
    if judged:
        told["comparison"] = judged.to_json()
        lines.append(verdicts(judged))
    emit(args, told, "\n".join(lines))
    broken = [r for r in found if r.figures.get("limit_us", 1e9) < r.figures.get("overhead_us", 0)]
    return EXIT_FAILED if broken or (judged and judged.regressions) else 0


def _dtypes(args: argparse.Namespace, known: tuple[torch.dtype, ...]) -> tuple[torch.dtype, ...]:
    """Those asked for, else all the backend has. Raises GlmCoreError where it lacks one."""
    import torch

    from glm_core.errors import GlmCoreError

    if not args.dtype:
        return known
    asked = tuple(getattr(torch, d) for d in dict.fromkeys(args.dtype))
    if lacking := [d for d in asked if d not in known]:
        names = ", ".join(str(d).removeprefix("torch.") for d in known)
        wrong = str(lacking[0]).removeprefix("torch.")
        raise GlmCoreError(f"--dtype {wrong}: backend {args.backend} computes in {names}")
    return asked


def _ceilings(args: argparse.Namespace) -> list[Row]:
    from glm_core.backends import registry
    from glm_core.bench import links
    from glm_core.measure import ceilings

    backend = registry.usable(args.backend)
    found = ceilings.measure(backend, _dtypes(args, backend.dtypes), args.rounds)
    if args.no_links:
        return found
    return [*found, *links.measure(args.backend, 2, args.rounds, "1M")]


def _ops(args: argparse.Namespace) -> list[Row]:
    import torch

    from glm_core.bench import ops

    asked = tuple(getattr(torch, d) for d in args.dtype or DTYPES)
    skipped: list[str] = []
    found = list(ops.measure(args.backend, args.op, asked, args.rounds, skipped.append))
    for reason in skipped:
        print(f"left out: {reason}", file=sys.stderr)
    return found


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
    told = ceilings.machine_with_device(registry.usable(name))
    return [r for d in dtypes for r in step.rows(d, args.rounds, peers, name, told)]


def _decode(args: argparse.Namespace) -> list[Row]:
    from glm_core.backends import registry
    from glm_core.bench import decode
    from glm_core.errors import GlmCoreError
    from glm_core.measure import ceilings

    if args.prefill < 0:
        raise GlmCoreError(f"--prefill={args.prefill} must be at least 0")
    told = ceilings.machine_with_device(registry.usable("cpu"))
    return decode.rows(args.rounds, args.prefill, args.dtype or list(decode.OURS), told)


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
    """Exit 1 where a row of B is slower."""
    from glm_core.bench import page
    from glm_core.bench.compare import compare
    from glm_core.measure import rows

    a, b = rows.read(args.a), rows.read(args.b)
    found = compare(a, b, args.by, args.least)
    if args.html:
        page.write(b, args.html, found)
    emit(args, found.to_json(), verdicts(found))
    return EXIT_FAILED if found.regressions else 0


def run_page(args: argparse.Namespace) -> int:
    """Always 0."""
    from glm_core.bench import page
    from glm_core.measure import rows

    print(page.write([r for f in args.files for r in rows.read(f)], args.html))
    return 0


def text_of(rows: list[Row]) -> str:
    """A table, then what each row tells besides, then where it was measured."""
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


def verdicts(found: Comparison) -> str:
    """A line a row."""
    head = ["what", f"{found.measure} B / A", "interval", "verdict"]
    rows = [
        [c.key, f"{c.ratio:.3f}", f"{c.low:.3f} to {c.high:.3f}", c.verdict] for c in found.changes
    ]
    lines = [columns([head, *rows])]
    if found.unmatched:
        lines.append(f"in one file only: {', '.join(found.unmatched)}")
    return "\n".join([*lines, *found.notes])
