"""`glm-core doctor --hardware`: everything about one backend on this device, in one file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from glm_core.cli.exits import EXIT_FAILED
from glm_core.cli.options import add_json, add_run, emit, run_config

STEPS = 60
"""of the loss curves where nothing else is said: the whole takes about ten minutes"""


def define(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "--hardware", action="store_true", help="conformance, alignment, utilisation; ten minutes"
    )
    parser.add_argument("--backend", metavar="NAME", help="who is examined")
    parser.add_argument("--op", metavar="NAME", help="one op's cases only")
    parser.add_argument("--controls", type=int, default=8, metavar="K", help="default %(default)s")
    parser.add_argument("--model", default="glm4-34m", metavar="PRESET", help="whose step is timed")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="default %(default)s")
    parser.add_argument("--out", metavar="FILE", help="default doctor-BACKEND.zip")
    add_run(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit 0 all good, 1 something is wrong (the file says what), 2 usage, 3 not available."""
    from glm_core.doctor import examination
    from glm_core.errors import GlmCoreError

    if not args.hardware or not args.backend:
        raise GlmCoreError(
            "doctor: says nothing without a device to examine; write glm-core doctor --hardware "
            "--backend NAME (see glm-core devices)"
        )
    if args.steps is None and not args.config:
        args.steps = STEPS
    asked = examination.Examination(
        backend=args.backend,
        config=run_config(args),
        controls=args.controls,
        op=args.op,
        preset=args.model,
        rounds=args.rounds,
    )
    out = Path(args.out or f"doctor-{args.backend.replace(':', '-')}.zip")
    found = examination.examine(asked, out, lambda part: print(part, file=sys.stderr))
    lines = [_line(name, part) for name, part in found["parts"].items()]
    emit(args, {**found, "file": str(out)}, "\n".join([*lines, f"send back: {out}"]))
    return 0 if found["ok"] else EXIT_FAILED


def _line(name: str, part: dict[str, object]) -> str:
    facts = ("error", "verdict", "pass", "fail", "unsupported")
    told = ", ".join(f"{k} {part[k]}" for k in facts if k in part)
    return f"{name:<12} {'good ' if part['ok'] else 'WRONG'} {part['seconds']:.0f} s  {told}"
