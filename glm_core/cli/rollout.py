"""Implements `glm-core align rollout`: do the engine that samples and the one that trains give the
same tokens the same probabilities?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from glm_core.cli.exits import EXIT_FAILED, EXIT_USAGE
from glm_core.cli.options import add_exact, add_json, emit
from glm_core.cli.progress import ProgressLine

if TYPE_CHECKING:
    from glm_core.model.glm import GLM
    from glm_core.rollout.files import Rollout
    from glm_core.rollout.report import Report

HELP = "judge the log probabilities of an engine that samples against those of the trainer"
DTYPES = ("float32", "bfloat16", "float16")


def define(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="the trainer's log probabilities, then the sampler's; one file: the sampler's, and "
        "the trainer's are computed with --model",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="[STEP=]DIR",
        help="weights that drew the tokens of a step (default step 0); may be given more than once",
    )
    parser.add_argument(
        "--before", metavar="DIR", help="weights before the first step's update, to find stale ones"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of weights and arithmetic (default: the files')"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        help="what the files do not say: temperature=0.7, processed=true, chunk=512 "
        "(docs/rollout.md)",
    )
    parser.add_argument(
        "--control",
        action="append",
        default=[],
        metavar="FILE",
        help="without weights: the same tokens from an honest engine; may be given more than once",
    )
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help="also compare this backend's prefill and decode with the training forward, op by op",
    )
    parser.add_argument(
        "--planted",
        action="store_true",
        help="judge planted mistakes and honest differences instead of files",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[1, 2],
        metavar="N",
        help="with --planted: seeds of the models and replies (default: 1 2)",
    )
    add_exact(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs `align rollout`. Returns 0 for identical and aligned, 1 for diverged, 2 where nothing
    could be judged."""
    from glm_core.errors import ConfigError

    if args.planted:
        return run_planted(args)
    if len(args.files) not in (1, 2) or (len(args.files) == 1 and not args.model):
        raise ConfigError(
            f"align rollout: {len(args.files)} files; give the trainer's and the sampler's, or the "
            "sampler's with --model"
        )
    require_together(args)
    result = judged(args)
    emit(args, result.to_json(), result.text())
    codes = {"diverged": EXIT_FAILED, "not judged": EXIT_USAGE}
    return codes.get(result.verdict, 0)


def require_together(args: argparse.Namespace) -> None:
    """Raises ConfigError for options that would do nothing, and BackendUnavailableError, before
    anything is computed."""
    from glm_core.backends import registry
    from glm_core.errors import ConfigError

    if args.model and args.control:
        raise ConfigError(
            "align rollout: --control stands in for --model; give one of them, not both"
        )
    for name in ("before", "backend", "exact"):
        if getattr(args, name) and not args.model:
            raise ConfigError(f"align rollout: --{name} needs the weights; give --model too")
    if args.backend:
        registry.usable(args.backend)


def judged(args: argparse.Namespace) -> Report:
    """Reads the files and the weights and judges them."""
    import dataclasses

    from glm_core.rollout import evidence, files, formats, report

    read = [files.stated(formats.load(f), args.set) for f in args.files]
    dtype = args.dtype or read[-1].settings.dtype or "float32"
    read = [files.stated(r, [f"dtype={dtype}"]) for r in read]
    sampler = read[-1]
    if not args.model:
        found = None
        if args.control:
            others = [files.stated(formats.load(f), args.set) for f in args.control]
            found = report.from_controls(read[0], others)
        return report.compare(read[0], sampler, found, [sampler.name])
    models = weights(args.model, dtype)
    before = load_model(args.before, dtype) if args.before else None
    known = evidence.gather(models, sampler.replies, sampler.settings, before, ProgressLine())
    trainer = read[0] if len(read) == 2 else recomputed(sampler, models, args.exact)
    result = report.compare(trainer, sampler, known, args.files)
    if not args.backend:
        return result
    from glm_core.rollout.paths import Paths

    parting = Paths(models, sampler.replies).part(args.backend)
    if parting.op and result.verdict != "diverged":  # in the range of rounding, and wrong
        result = dataclasses.replace(result, verdict="diverged", sentence=parting.text())
    return dataclasses.replace(result, place=parting.text())


def recomputed(sampler: Rollout, models: dict[int, GLM], exact: bool) -> Rollout:
    """Returns the trainer's side, computed by the training forward pass: by the reference, or in
    exact arithmetic."""
    from glm_core.backends import registry
    from glm_core.rollout.evidence import trained_logprobs

    with registry.use("cpu" if exact else "reference", exact=exact):
        found = trained_logprobs(models, sampler.replies, sampler.settings)
    return sampler.given(found, engine="training forward")


def weights(names: list[str], dtype: str) -> dict[int, GLM]:
    """Returns the models of `STEP=DIR`. Raises ConfigError for a step given twice."""
    from glm_core.errors import ConfigError

    found: dict[int, GLM] = {}
    for name in names:
        head, sign, tail = name.partition("=")
        numbered = bool(sign) and head.isdigit()
        step = int(head) if numbered else 0
        if step in found:
            raise ConfigError(f"--model: step {step} is given twice; write STEP=DIR for each")
        found[step] = load_model(tail if numbered else name, dtype)
    return found


def load_model(path: str, dtype: str) -> GLM:
    """Returns the model of a checkpoint of any layout, which has a config.json, or of a training
    run."""
    from pathlib import Path

    import torch

    from glm_core.pretrained.load import load_run_model
    from glm_core.pretrained.weights.reading import open_checkpoint
    from glm_core.training import checkpoint

    working: torch.dtype = getattr(torch, dtype)
    place = Path(path)
    if ((place if place.is_dir() else place.parent) / "config.json").is_file():
        return open_checkpoint(path).load(working)
    return load_run_model(checkpoint.find(place))[0].to(working)


def run_planted(args: argparse.Namespace) -> int:
    """Judges the planted mistakes. Returns 0 where enough are named and nothing honest is
    convicted."""
    from glm_core.rollout.campaign import campaign

    result = campaign(seeds=args.seeds, progress=ProgressLine())
    emit(args, result.to_json(), result.text())
    return 0 if result.reached else EXIT_FAILED
