"""`glm-core train`: one run on one backend, resumable, everything it produced in one folder."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_core.cli.exits import EXIT_INTERRUPTED
from glm_core.cli.options import add_json, add_run, add_timeout, emit, run_config

if TYPE_CHECKING:
    from glm_core.config import RunConfig
    from glm_core.model.adapters import AdapterConfig
    from glm_core.model.glm import GLM
    from glm_core.training.live import Live
    from glm_core.training.loop import Result
    from glm_core.training.trainer import Sampler


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
    parser.add_argument(
        "--metrics-port",
        type=int,
        default=0,
        metavar="PORT",
        help="Prometheus endpoint http://HOST:PORT/metrics (default: none; docs/metrics.md)",
    )
    parser.add_argument(
        "--metrics-host", default="127.0.0.1", metavar="HOST", help="(default %(default)s)"
    )
    parser.add_argument(
        "--adapter",
        choices=["lora", "ptuning"],
        help="train this beside a frozen --base; saved in DIR",
    )
    parser.add_argument(
        "--base", metavar="PATH", help="checkpoint or run whose model --adapter leaves unchanged"
    )
    parser.add_argument(
        "--pairs",
        metavar="FILE",
        help="conversations to learn the answers of, a line of JSON each (docs/checkpoints.md)",
    )
    parser.add_argument("--rank", type=int, default=8, metavar="R", help="of LoRA (default 8)")
    parser.add_argument(
        "--prefix-length", type=int, default=128, metavar="P", help="of ptuning (default 128)"
    )
    parser.add_argument(
        "--prefix-projection",
        action="store_true",
        help="of ptuning: the prefix is what two linears make of a table (docs/checkpoints.md)",
    )
    parser.add_argument(
        "--dropout",
        type=float,
        default=0.0,
        metavar="P",
        help="in training, of LoRA's input or the prefix (default %(default)s; ChatGLM: 0.1)",
    )
    parser.add_argument(
        "--plan",
        metavar="PLAN",
        help="over several processes, e.g. tp=2,pp=2,micro_batches=4 (start with glm-core launch "
        "or torchrun; docs/distributed.md)",
    )
    add_timeout(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit 0 finished, 1 training had to stop, 130 interrupted with a checkpoint written."""
    from glm_core.training import trainer

    flags = {k: getattr(args, k) or None for k in ("backend", "dtype", "strict", "compile")}
    config, model, sampler = run_config(args, **flags), None, None
    if args.plan is not None:
        return run_plan(args, config)
    if args.adapter or args.base or args.pairs:
        config, model, sampler = adapted(args, config)
    with live_of(args, config) as live:
        result = trainer.run(
            config,
            args.out,
            resume=args.resume,
            tensorboard=args.tensorboard,
            live=live,
            sampler=sampler,
            model=model,
            timeout_s=args.timeout,
        )
    facts, lines = told(result)
    if model is not None:
        from glm_core.pretrained import adapter_files

        path = Path(args.out) / adapter_files.NAME
        adapter_files.save_adapter(path, model, adapter_config(args))
        facts["adapter"] = str(path)
        lines += [f"adapter: {path}"]
    emit(args, facts, "\n".join(lines))
    return EXIT_INTERRUPTED if result.interrupted else 0


def told(result: Result) -> tuple[dict[str, Any], list[str]]:
    """How a run ended, for machines and for people."""
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
    return facts, [*lines, f"checkpoint: {result.checkpoint}"]


def run_plan(args: argparse.Namespace, config: RunConfig) -> int:
    """One process's part of a job; rank 0 tells how it goes and how it ended."""
    from glm_core.distributed.plan import parse
    from glm_core.errors import ConfigError

    plan = parse(args.plan)
    if unfit := [f"--{k}" for k in ("adapter", "base", "pairs") if getattr(args, k)]:
        raise ConfigError(f"train --plan: does not go with {', '.join(unfit)}; leave it out")
    from glm_core.distributed import run as distributed

    tells = os.environ.get("RANK") == "0"
    with live_of(args, config, plan.world) if tells else nullcontext() as live:
        result = distributed.run(
            config,
            plan,
            args.out,
            resume=args.resume,
            tensorboard=args.tensorboard,
            live=live,
            timeout_s=args.timeout,
        )
    if tells:
        facts, lines = told(result)
        emit(args, facts, "\n".join(lines))
    return EXIT_INTERRUPTED if result.interrupted else 0


@contextmanager
def live_of(args: argparse.Namespace, config: RunConfig, chips: int = 1) -> Iterator[Live | None]:
    """The figures that --tensorboard and --metrics-port show, None without them; MFU over the peak
    of so many chips. Raises ConfigError for a port that cannot be had."""
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
    live = Live(backend, flops, chips * peak.tflops, args.metrics_port, args.metrics_host)
    times = f"{chips} x " if chips > 1 else ""
    print(f"MFU over {times}{peak.tflops:.3g} TFLOPS: {peak.source}", file=sys.stderr)
    try:
        yield live
    finally:
        live.close()


def adapted(args: argparse.Namespace, config: RunConfig) -> tuple[RunConfig, GLM, Sampler | None]:
    """The config with the base's model, the base with new adapters, and what they learn from: None
    for the config's own data."""
    from glm_core.errors import ConfigError
    from glm_core.model import adapters

    if not args.base:
        raise ConfigError("train --adapter: needs --base PATH, a checkpoint or a run's folder")
    if not args.adapter:
        raise ConfigError("train --base: needs --adapter lora or ptuning; the base stays as it is")
    config, model, sampler = (of_pairs if args.pairs else of_text)(args, config)
    return config, adapters.attach(model, adapter_config(args), config.train.seed), sampler


def of_pairs(args: argparse.Namespace, config: RunConfig) -> tuple[RunConfig, GLM, Sampler]:
    """The base, and conversations in its own words."""
    import torch

    from glm_core.pretrained import conversations
    from glm_core.pretrained.load import from_path
    from glm_core.pretrained.pairs import Pairs

    source = from_path(args.base, getattr(torch, config.train.dtype))
    pairs = conversations.read(source, args.pairs)
    length = min(config.data.length, source.model.config.max_length)
    shaped = dataclasses.replace(config.data, length=length, vocab=source.tokenizer.vocab)
    config = dataclasses.replace(config, model=source.model.config, data=shaped)
    return config, source.model, Pairs(pairs, length, config.train.seed)


def of_text(args: argparse.Namespace, config: RunConfig) -> tuple[RunConfig, GLM, Sampler | None]:
    """The base, and the config's text in the base's own tokens. Raises ConfigError where those are
    not of our tokenizer, whose blanks the text is given."""
    from glm_core.config import load
    from glm_core.data.open import open_sampler
    from glm_core.data.tokenizer import Tokenizer
    from glm_core.errors import ConfigError
    from glm_core.pretrained.tokenizers import FILES, beside
    from glm_core.pretrained.weights import open_checkpoint

    path, model_config = Path(args.base), None
    folder = path if path.is_dir() else path.parent
    pieces: Tokenizer | None = None
    if any((folder / name).is_file() for name in FILES):
        found = beside(folder, "of a base")
        if isinstance(found, Tokenizer):
            pieces = found
        else:
            raise ConfigError(
                f"train --base {path}: text is learnt with a tokenizer of ours, this base has "
                "another; give conversations instead (--pairs FILE)"
            )
    if (path / "config.toml").is_file():
        model_config = load(path / "config.toml").model
        path = path / "checkpoints"
    elif args.config or args.preset:
        model_config = config.model
    checkpoint = open_checkpoint(path, model_config)
    import torch

    model = checkpoint.load(getattr(torch, config.train.dtype), quantized=True)
    if pieces is None:
        return dataclasses.replace(config, model=model.config), model, None
    shaped = dataclasses.replace(config.data, vocab=pieces.vocab)
    config = dataclasses.replace(config, model=model.config, data=shaped)
    sampler = open_sampler(
        shaped, config.train.seed, ".cache", positions=model.config.positions, tokenizer=pieces
    )
    return config, model, sampler


def adapter_config(args: argparse.Namespace) -> AdapterConfig:
    """That of the options."""
    from glm_core.model.adapters import AdapterConfig

    return AdapterConfig(
        kind=args.adapter,
        rank=args.rank,
        dropout=args.dropout,
        prefix_length=args.prefix_length,
        prefix_projection=args.prefix_projection,
    )
