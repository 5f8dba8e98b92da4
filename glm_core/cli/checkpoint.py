"""`glm-core checkpoint`: inspects and converts the checkpoints of other projects."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from glm_core.cli.options import add_json, add_quantization, emit, output_folder, quantization

if TYPE_CHECKING:
    from glm_core.pretrained.weights.reading import Checkpoint

LAYOUTS = (
    "chatglm2, chatglm-6b, glm, glm4, glm4_moe, glm4_moe_fused, glm4_moe_lite, "
    "glm4_moe_lite_fused, glm-130b, glm-block, glm-core, sat-chatglm-6b"
)
"""names of the layouts, written out because --help imports no torch; a test compares them"""
ADAPTER = "adapter.safetensors, a run that has one, a folder of the peft package"


def define(parser: argparse.ArgumentParser) -> None:
    """Adds the command's subcommands."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    inspect = actions.add_parser("inspect", help="print layout, sizes and dtypes; reads no weights")
    convert = actions.add_parser(
        "convert", help="write in another layout, dtype or tensor-parallel degree"
    )
    for action in (inspect, convert):
        action.add_argument(
            "checkpoint",
            metavar="PATH",
            help="folder or file: a training run, safetensors, .bin, .pt, SAT shards",
        )
        action.add_argument(
            "--preset", metavar="NAME", help="the model's sizes, if there is no config.json"
        )
        add_json(action)
    inspect.set_defaults(run=run_inspect)
    convert.add_argument("out", type=output_folder, metavar="OUT", help="new folder")
    convert.add_argument("--to", metavar="LAYOUT", help=f"one of {LAYOUTS} (default: the same)")
    convert.add_argument(
        "--tp",
        type=int,
        default=1,
        metavar="N",
        help="tensor-parallel ranks of a sharded layout (default %(default)s)",
    )
    convert.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of all weights that are not quantized (default: as stored)",
    )
    convert.add_argument(
        "--dequantize", action="store_true", help="convert int8 and int4 weights to floating point"
    )
    convert.add_argument("--merge", metavar="ADAPTER", help=f"add a LoRA to the weights: {ADAPTER}")
    add_quantization(convert, "quantize the layers' linears to 8 or 4 bits")
    convert.add_argument(
        "--shard-gb",
        type=float,
        default=5.0,
        metavar="GB",
        help="limit of the size of a safetensors file (default %(default)s)",
    )
    convert.set_defaults(run=run_convert)
    adapter = actions.add_parser(
        "adapter",
        help="convert a trained LoRA or prefix between our format, peft's and ChatGLM's "
        "prefix_encoder.*",
    )
    adapter.add_argument("adapter", metavar="PATH", help=f"{ADAPTER}, or ChatGLM's files")
    adapter.add_argument(
        "out", metavar="OUT", help="X.safetensors: our format; X.bin: ChatGLM's; a folder: peft's"
    )
    adapter.add_argument(
        "--base", metavar="PATH", help="the adapter's base, needed to read or write peft's format"
    )
    add_json(adapter)
    adapter.set_defaults(run=run_adapter)


def open_source(args: argparse.Namespace) -> Checkpoint:
    """Opens the checkpoint of the options. Raises CheckpointError."""
    from glm_core.model.presets import preset
    from glm_core.pretrained.weights.reading import open_checkpoint

    return open_checkpoint(args.checkpoint, preset(args.preset) if args.preset else None)


def run_inspect(args: argparse.Namespace) -> int:
    """Prints the facts of a checkpoint; exits 0 if it is complete and fits its config, else 2."""
    facts = summary(open_source(args))
    lines = [f"{k.replace('_', ' '):20} {v}" for k, v in facts.items() if k != "config"]
    lines += [f"  {key:18} {value}" for key, value in facts["config"].items()]
    emit(args, facts, "\n".join(lines))
    return 0


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the facts of a checkpoint, from the headers of its files alone."""
    from glm_core.config import to_dict
    from glm_core.pretrained.weights.reading import is_training_state

    tables = [
        stored
        for rank in checkpoint.files.ranks
        for key, stored in rank.items()
        if not is_training_state(checkpoint, key)
    ]
    return {
        "layout": checkpoint.layout.name,
        "about": checkpoint.layout.about,
        "ranks": checkpoint.num_ranks,
        "files": len({s.file for s in tables}),
        "leftovers": list(checkpoint.files.leftovers),
        "quantized_bits": checkpoint.bits,
        "dtypes": sorted({str(s.dtype).removeprefix("torch.") for s in tables}),
        "parameters": sum(math.prod(shape) for shape in checkpoint.shapes.values()),
        "bytes": sum(s.num_bytes for s in tables),
        "config": to_dict(checkpoint.config),
    }


def run_convert(args: argparse.Namespace) -> int:
    """Converts a checkpoint; exits 0 if OUT is complete, otherwise OUT does not exist."""
    import torch

    from glm_core.pretrained.weights.writing import convert, target

    source = open_source(args)
    if args.merge:
        source = _merged(args, source)
    form = target(
        args.to or source.layout.name,
        num_ranks=args.tp,
        dequantize=args.dequantize,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        quantize=quantization(args),
        shard_bytes=int(args.shard_gb * 1e9),
    )
    begin = time.perf_counter()
    files = [str(f) for f in convert(source, args.out, form, print_progress)]
    if sys.stderr.isatty():
        print(file=sys.stderr)
    facts = {
        "from": source.layout.name,
        "from_ranks": source.num_ranks,
        "to": form.layout.name,
        "ranks": form.num_ranks,
        "bytes": sum(os.path.getsize(f) for f in files),
        "seconds": round(time.perf_counter() - begin, 1),
        "files": files,
        "leftovers": list(source.files.leftovers),
    }
    text = "{from} x {from_ranks} -> {to} x {ranks}: {bytes} bytes in {seconds} s".format(**facts)
    emit(args, facts, "\n".join([text, *files]))
    return 0


def _merged(args: argparse.Namespace, source: Checkpoint) -> Checkpoint:
    """Returns the checkpoint with the LoRA of --merge added."""
    from glm_core.pretrained import adapters
    from glm_core.pretrained.weights.merging import merged

    config, state = adapters.read(args.merge, source.config)
    adapters.require_fits(args.merge, source.config, config, state)
    return merged(source, config, state, dequantize=args.dequantize)


def run_adapter(args: argparse.Namespace) -> int:
    """Converts an adapter; exits 0 when OUT is written."""
    from pathlib import Path

    from glm_core.config import to_dict
    from glm_core.errors import CheckpointError
    from glm_core.pretrained import adapters, peft
    from glm_core.pretrained.weights.reading import open_checkpoint

    base = open_checkpoint(args.base) if args.base else None
    config, state = adapters.read(args.adapter, base.config if base else None)
    if base is not None:
        adapters.require_fits(args.adapter, base.config, config, state)
    if Path(args.out).suffix:
        adapters.write(args.out, config, state)
    elif base is None:
        raise CheckpointError(f"{args.out}: a folder is written in peft's format; add --base PATH")
    else:
        peft.write(Path(args.out), config, state, base.layout, base.config)
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    lines = [f"{name:24} {shape}" for name, shape in shapes.items()]
    facts = {"out": args.out, "config": to_dict(config), "shapes": shapes}
    emit(args, facts, "\n".join([f"{config.kind} -> {args.out}", *lines]))
    return 0


def print_progress(done: int, total: int, name: str) -> None:
    """Prints to stderr: on a terminal one line that is overwritten, else ten lines in all."""
    if sys.stderr.isatty():
        print(f"\r{done}/{total} {name[:60]:60}", end="", file=sys.stderr, flush=True)
    elif done == total or done * 10 // total > (done - 1) * 10 // total:
        print(f"{done}/{total} {name}", file=sys.stderr)
