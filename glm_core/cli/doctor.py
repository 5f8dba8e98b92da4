"""Implements `glm-core doctor --hardware`: examines one backend on this device and writes what it
found into one folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from glm_core.cli.exits import EXIT_FAILED
from glm_core.cli.options import add_json, add_run, emit, output_folder, run_config

STEPS = 60
"""default steps of the loss curves"""


def define(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--hardware", action="store_true", help="run the examination")
    parser.add_argument("--backend", metavar="NAME", help="backend to examine")
    parser.add_argument(
        "--build",
        action="store_true",
        help="first build this clone's kernels for the card; the time counts",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=10.0,
        metavar="N",
        help="the time in all; parts that would take longer are skipped and named, default "
        "%(default)g",
    )
    parser.add_argument("--op", metavar="NAME", help="only this op's cases and timings")
    parser.add_argument("--controls", type=int, default=5, metavar="K", help="default %(default)s")
    parser.add_argument(
        "--model",
        default="glm4-34m",
        metavar="PRESET",
        help="model whose step is timed, default %(default)s",
    )
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--out",
        type=output_folder,
        metavar="FOLDER",
        help="new folder to fill, default doctor-BACKEND; packed as .zip",
    )
    add_run(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exits 0 where everything is good, 1 where the file says what is wrong, 2 on usage errors, 3
    where the backend is not available."""
    from glm_core.doctor import build
    from glm_core.errors import GlmCoreError

    if not args.hardware or not args.backend:
        raise GlmCoreError(
            "doctor: needs a device to examine; write glm-core doctor --hardware "
            "--backend NAME (see glm-core devices)"
        )
    if args.steps is None and not args.config:
        args.steps = STEPS
    out = Path(args.out or f"doctor-{args.backend.replace(':', '-')}")
    build.refuse_folder_in_use(out)
    built = build.build(args.backend, 60 * args.minutes) if args.build else None
    from glm_core.doctor import examination  # loads the kernels: not before they are built

    settings = examination.Examination(
        backend=args.backend,
        config=run_config(args),
        minutes=args.minutes,
        build=built,
        controls=args.controls,
        op=args.op,
        preset=args.model,
        rounds=args.rounds,
    )
    summary = examination.examine(settings, out, lambda part: print(part, file=sys.stderr))
    lines = [_line(name, part) for name, part in summary["parts"].items()]
    lines += [f"{n:<12} SKIPPED  {why}; more --minutes" for n, why in summary["skipped"].items()]
    emit(args, {**summary, "folder": str(out)}, "\n".join([*lines, f"send back: {out}.zip"]))
    return 0 if summary["ok"] else EXIT_FAILED


def _line(name: str, part: dict[str, object]) -> str:
    fields = (
        "error",
        "verdict",
        "pass",
        "fail",
        "unsupported",
        "calls",
        "guilty",
        "missed",
        "not_run",
    )
    found = {k: part[k] for k in fields if k in part}
    counts = {k: len(v) if isinstance(v, list) else v for k, v in found.items()}
    result = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in counts.items())
    return f"{name:<12} {'good ' if part['ok'] else 'WRONG'} {part['seconds']:.0f} s  {result}"
