"""Implements `glm-core verdict`: judges every operator of any PyTorch training script."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from glm_core.align import NUM_CONTROLS
from glm_core.cli.exits import EXIT_FAILED
from glm_core.cli.options import add_json, emit, output_file


def define(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--steps",
        default="2",
        metavar="N,N",
        help="optimizer steps to judge, from 1; the script ends after the last (default 2)",
    )
    parser.add_argument("--on", default="", metavar="DEVICE", help="torch's default device")
    parser.add_argument(
        "--with",
        dest="context",
        default="",
        metavar="MODULE:CONTEXT",
        help="run the script plain, then in this context manager, such as flag_gems:use_gems",
    )
    parser.add_argument(
        "--false-alarm-rate",
        type=float,
        default=1e-3,
        metavar="RATE",
        help="probability that an honest run is called wrong (default %(default)g)",
    )
    parser.add_argument(
        "--record",
        type=output_file,
        default="",
        metavar="FILE",
        help="write a sample of the calls, to compare with; in a job, {rank} stands for the rank",
    )
    parser.add_argument(
        "--against",
        default="",
        metavar="FILE",
        help="compute the calls of a record of another machine again, and judge both machines; "
        "the script may be left out",
    )
    parser.add_argument(
        "--curve",
        type=int,
        default=0,
        metavar="N",
        help="also judge the loss of N steps, with control runs of the script "
        "(with --with or --record)",
    )
    parser.add_argument(
        "--controls",
        type=int,
        default=NUM_CONTROLS,
        metavar="K",
        help="control runs for --curve (default %(default)s)",
    )
    parser.add_argument("--report", type=output_file, metavar="FILE", help="HTML report to write")
    parser.add_argument(
        "--junit", type=output_file, metavar="FILE", help="JUnit XML report to write"
    )
    parser.add_argument("--sarif", type=output_file, metavar="FILE", help="SARIF report to write")
    add_json(parser)
    parser.add_argument("command_words", nargs=argparse.REMAINDER, metavar="-- SCRIPT ARGS")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command. Returns 0 where every judged operator is honest, 1 where one is guilty;
    raises where the script gives no verdict."""
    from glm_core.verdict import page, render
    from glm_core.verdict.outcome import judge_all
    from glm_core.verdict.script import Request

    script, words = _script(args.command_words, optional=bool(args.against and not args.record))
    request = Request(
        script=script,
        args=words,
        steps=_steps(args.steps),
        device=args.on,
        context=args.context,
        false_alarm_rate=args.false_alarm_rate,
        record=args.record,
        against=args.against,
        curve_steps=args.curve,
    )
    outcome = judge_all(request, args.controls, lambda text: print(text, file=sys.stderr))
    if outcome.elsewhere:
        print(f"{outcome.report.sentence()}; rank 0 gives the verdict on all", file=sys.stderr)
        return 0
    report, comparison, curve = outcome.report, outcome.comparison, outcome.curve
    if args.junit:
        Path(args.junit).write_text(render.junit(report, comparison, curve), encoding="utf-8")
    if args.sarif:
        Path(args.sarif).write_text(render.sarif(report, comparison), encoding="utf-8")
    if args.report:
        page.write(
            outcome,
            args.report,
            "glm-core verdict "
            + shlex.join(["--", script, *words] if script else ["--against", args.against]),
        )
    emit(args, outcome.to_json(), render.text(report, comparison, outcome.sentences()))
    return 0 if outcome.ok else EXIT_FAILED


def _script(words: list[str], optional: bool) -> tuple[str, list[str]]:
    from glm_core.errors import ConfigError

    words = words[1:] if words[:1] == ["--"] else words
    if not words and optional:
        return "", []
    if not words:
        raise ConfigError("verdict: no script; pass it after --: glm-core verdict -- train.py")
    return words[0], words[1:]


def _steps(text: str) -> list[int]:
    from glm_core.errors import ConfigError

    try:
        steps = sorted({int(word) for word in text.split(",")})
    except ValueError:
        steps = []
    if not steps or steps[0] < 1:
        raise ConfigError(f"verdict: --steps {text}; pass numbers from 1, such as 2,5")
    return steps
