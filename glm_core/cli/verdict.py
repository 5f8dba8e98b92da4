"""Implements `glm-core verdict`: judges every operator of any PyTorch training script."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from glm_core.cli.exits import EXIT_FAILED
from glm_core.cli.options import add_json, emit

if TYPE_CHECKING:
    from glm_core.verdict.report import Report


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
    parser.add_argument("--junit", metavar="FILE", help="JUnit XML report to write")
    parser.add_argument("--sarif", metavar="FILE", help="SARIF report to write")
    add_json(parser)
    parser.add_argument("command_words", nargs=argparse.REMAINDER, metavar="-- SCRIPT ARGS")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command. Returns 0 where every judged operator is honest, 1 where one is guilty;
    raises where the script gives no verdict."""
    from glm_core.verdict import render
    from glm_core.verdict.script import Request, judge_script

    script, words = _script(args.command_words)
    request = Request(
        script=script,
        args=words,
        steps=_steps(args.steps),
        device=args.on,
        false_alarm_rate=args.false_alarm_rate,
    )
    reports = [judge_script(request)]
    if args.context:
        import dataclasses

        reports.append(judge_script(dataclasses.replace(request, context=args.context)))
    last = reports[-1]
    for path, write in ((args.junit, render.junit), (args.sarif, render.sarif)):
        if path:
            Path(path).write_text(write(last), encoding="utf-8")
    value = last.to_json() | ({"plain": reports[0].to_json()} if args.context else {})
    emit(args, value, "\n".join([*_plain(reports[:-1]), render.text(last)]))
    return EXIT_FAILED if any(not r.ok for r in reports) else 0


def _plain(reports: list[Report]) -> list[str]:
    return [f"without the context: {r.sentence()}" for r in reports]


def _script(words: list[str]) -> tuple[str, list[str]]:
    from glm_core.errors import ConfigError

    words = words[1:] if words[:1] == ["--"] else words
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
