"""`glm-core train`: one run on one backend, resumable, everything it produced in one folder."""

from __future__ import annotations

import argparse

from glm_core.cli.exits import EXIT_INTERRUPTED
from glm_core.cli.options import add_json, add_run, emit, run_config


def define(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_run(parser)
    parser.add_argument("--backend", metavar="NAME", help="who runs the ops (default cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="working dtype")
    parser.add_argument(
        "--out", default="runs/train", metavar="DIR", help="results (default %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from DIR's last checkpoint")
    parser.add_argument(
        "--strict", action="store_true", help="a fallback to a reference is an error"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the whole model")
    parser.add_argument(
        "--tensorboard", action="store_true", help="event files into DIR/tensorboard"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit 0 finished, 1 training had to stop, 130 interrupted with a checkpoint written."""
    from glm_core import train

    flags = {k: getattr(args, k) or None for k in ("backend", "dtype", "strict", "compile")}
    config = run_config(args, **flags)
    result = train.run(config, args.out, resume=args.resume, tensorboard=args.tensorboard)
    fallbacks = [{**f._asdict(), "count": n} for f, n in result.fallbacks.items()]
    facts = {
        "steps": result.steps,
        "loss": result.loss,
        "tokens_per_s": result.tokens_per_s,
        "interrupted": result.interrupted,
        "checkpoint": str(result.checkpoint),
        "fallbacks": fallbacks,
    }
    lines = [f"step {result.steps}: loss {result.loss:.4f}, {result.tokens_per_s:.0f} tokens/s"]
    lines += [
        f"fallback: {f['op']} ran as reference {f['count']} times: {f['reason']}" for f in fallbacks
    ]
    lines += [f"checkpoint: {result.checkpoint}"]
    emit(args, facts, "\n".join(lines))
    return EXIT_INTERRUPTED if result.interrupted else 0
