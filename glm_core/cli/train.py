"""`glm-core train`: trains a model, or an adapter beside a frozen base; all results lie in one
folder."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_core.cli.exits import EXIT_INTERRUPTED
from glm_core.cli.options import (
    add_exact,
    add_json,
    add_run,
    add_timeout,
    emit,
    output_folder,
    run_config,
)

if TYPE_CHECKING:
    from glm_core.config import RunConfig
    from glm_core.training.live import Live
    from glm_core.training.loop import Result


def define(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_run(parser)
    parser.add_argument("--backend", metavar="NAME", help="backend that runs the ops (default cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="working dtype")
    parser.add_argument(
        "--out",
        type=output_folder,
        default="runs/train",
        metavar="DIR",
        help="folder of results (default %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="continue from DIR's last checkpoint")
    parser.add_argument(
        "--strict", action="store_true", help="make a fallback to a reference an error"
    )
    add_exact(parser)
    parser.add_argument("--compile", action="store_true", help="torch.compile the whole model")
    parser.add_argument(
        "--graph",
        action="store_true",
        help="record a micro-batch's kernels once and replay them (cuda, rocm)",
    )
    parser.add_argument(
        "--offload-optimizer",
        action="store_true",
        help="keep masters and moments in main memory and update them there (no effect on the CPU)",
    )
    parser.add_argument(
        "--tensorboard", action="store_true", help="write event files into DIR/tensorboard"
    )
    parser.add_argument(
        "--metrics-port",
        type=int,
        default=0,
        metavar="PORT",
        help="serve Prometheus metrics at http://HOST:PORT/metrics (default: no; docs/metrics.md)",
    )
    parser.add_argument(
        "--metrics-host", default="127.0.0.1", metavar="HOST", help="default %(default)s"
    )
    parser.add_argument(
        "--adapter",
        choices=["lora", "ptuning"],
        help="train this adapter beside a frozen --base; saved in DIR",
    )
    parser.add_argument(
        "--base",
        metavar="PATH",
        help="checkpoint or run whose model stays unchanged beside --adapter, or is trained under "
        "--plan",
    )
    parser.add_argument(
        "--pairs",
        metavar="FILE",
        help="conversations whose replies are learned, one JSON object a line "
        "(docs/checkpoints.md)",
    )
    parser.add_argument("--rank", type=int, default=8, metavar="R", help="rank of LoRA (default 8)")
    parser.add_argument(
        "--prefix-length",
        type=int,
        default=128,
        metavar="P",
        help="tokens of a ptuning prefix (default 128)",
    )
    parser.add_argument(
        "--prefix-projection",
        action="store_true",
        help="ptuning: two linears make the prefix from a table (docs/checkpoints.md)",
    )
    parser.add_argument(
        "--dropout",
        type=float,
        default=0.0,
        metavar="P",
        help="share of LoRA's input or of the prefix that is zeroed in training (default "
        "%(default)s; ChatGLM uses 0.1)",
    )
    parser.add_argument(
        "--plan",
        metavar="PLAN",
        help="parallelism over several processes, e.g. tp=2,pp=2,micro_batches=4 (start with "
        "glm-core launch or torchrun; docs/distributed.md)",
    )
    add_timeout(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains; exits 0 if it finished, 1 if training had to stop, 130 if it was interrupted with a
    checkpoint written."""
    options = ("backend", "dtype", "strict", "exact", "compile", "graph", "offload_optimizer")
    flags = {k: getattr(args, k) or None for k in options}
    config = run_config(args, **flags)
    if args.plan is not None:
        return run_plan(args, config)
    if args.adapter or args.base or args.pairs:
        return run_finetune(args, config)
    from glm_core.training.run import run as train

    with live_metrics(args, config) as live:
        result = train(config, args.out, live=live, **run_options(args))
    return report(args, result)


def run_plan(args: argparse.Namespace, config: RunConfig) -> int:
    """Trains as one process of a distributed job; rank 0 reports."""
    from glm_core.distributed.plan import parse
    from glm_core.errors import ConfigError

    plan = parse(args.plan)
    if args.adapter:
        raise ConfigError("train --plan: cannot be combined with --adapter; leave it out")
    if bool(args.base) != bool(args.pairs):
        raise ConfigError(
            "train --plan: all weights of --base are trained on --pairs; give both or neither"
        )
    from glm_core.distributed import run as distributed

    start: dict[str, Any] = {}
    if args.base:
        from glm_core.pretrained import finetune

        config, start["sampler"], start["weights"] = finetune.planned(args.base, args.pairs, config)

    is_reporter = os.environ.get("RANK") == "0"
    with live_metrics(args, config, plan.world) if is_reporter else nullcontext() as live:
        result = distributed.run(config, plan, args.out, live=live, **start, **run_options(args))
    return report(args, result) if is_reporter else exit_code(result)


def run_finetune(args: argparse.Namespace, config: RunConfig) -> int:
    """Trains an adapter beside a frozen base."""
    from glm_core.errors import ConfigError
    from glm_core.model.adapters import AdapterConfig
    from glm_core.pretrained import finetune

    if not args.base:
        raise ConfigError("train --adapter: needs --base PATH, a checkpoint or a run's folder")
    if not args.adapter:
        raise ConfigError("train --base: needs --adapter lora or ptuning; the base stays as it is")
    adapter = AdapterConfig(
        kind=args.adapter,
        rank=args.rank,
        dropout=args.dropout,
        prefix_length=args.prefix_length,
        prefix_projection=args.prefix_projection,
    )
    base_config = config.model if args.config or args.preset else None
    job = finetune.prepare(
        args.base, args.pairs, adapter=adapter, config=config, base_config=base_config
    )
    with live_metrics(args, job.config) as live:
        result, path = job.run(args.out, live=live, **run_options(args))
    return report(args, result, path)


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that every kind of run takes."""
    return {"resume": args.resume, "tensorboard": args.tensorboard, "timeout_s": args.timeout}


def report(args: argparse.Namespace, result: Result, adapter: Path | None = None) -> int:
    """Prints how the run ended and returns the exit code."""
    fallbacks = [{**f._asdict(), "count": n} for f, n in result.fallbacks.items()]
    facts = {
        "steps": result.steps,
        "loss": result.loss,
        "tokens_per_s": result.tokens_per_s,
        "interrupted": result.interrupted,
        "checkpoint": str(result.checkpoint),
        "fallbacks": fallbacks,
    }
    loss = "" if result.loss is None else f" loss {result.loss:.4f},"
    lines = [f"step {result.steps}:{loss} {result.tokens_per_s:.0f} tokens/s"]
    lines += [
        f"fallback: {f['op']} ran as reference {f['count']} times: {f['reason']}" for f in fallbacks
    ]
    lines += [f"checkpoint: {result.checkpoint}"]
    if adapter:
        facts["adapter"] = str(adapter)
        lines += [f"adapter: {adapter}"]
    emit(args, facts, "\n".join(lines))
    return exit_code(result)


def exit_code(result: Result) -> int:
    """Returns 130 for an interrupted run, else 0."""
    return EXIT_INTERRUPTED if result.interrupted else 0


@contextmanager
def live_metrics(
    args: argparse.Namespace, config: RunConfig, num_chips: int = 1
) -> Iterator[Live | None]:
    """Serves the metrics of --tensorboard and --metrics-port while the run lasts; gives None
    without these options. MFU relates to the peak of `num_chips` chips. Raises ConfigError for a
    port that cannot be opened."""
    if not (args.tensorboard or args.metrics_port):
        yield None
        return
    import torch

    from glm_core.backends import registry
    from glm_core.errors import ConfigError
    from glm_core.measure import ceilings
    from glm_core.planner.cost import Work, model_flops
    from glm_core.training.live import Live

    if not 0 <= args.metrics_port < 65536:
        raise ConfigError(f"--metrics-port {args.metrics_port}: must lie in 1 ... 65535")
    backend = registry.usable(config.train.backend)
    peak = ceilings.peak(backend, getattr(torch, config.train.dtype))
    flops = model_flops(Work(model=config.model, seq=config.data.length))
    live = Live(backend, flops, num_chips * peak.tflops, args.metrics_port, args.metrics_host)
    times = f"{num_chips} x " if num_chips > 1 else ""
    print(f"MFU over {times}{peak.tflops:.3g} TFLOPS: {peak.source}", file=sys.stderr)
    try:
        yield live
    finally:
        live.close()
