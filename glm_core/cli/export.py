"""`glm-core export`: a model as an ONNX file with a KV cache."""

from __future__ import annotations

import argparse
from typing import Any

from glm_core.cli.generate import adapt, add_model
from glm_core.cli.options import add_json, add_quantization, emit


def define(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_model(parser)
    parser.add_argument("out", metavar="OUT", help="new folder for model.onnx and its weights")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="only float32 can be exported (default %(default)s)",
    )
    add_quantization(
        parser,
        "the four linears of a layer as int8 or int4 codes, by MatMulNBits",
        rounding="8: ONNX Runtime may round activations to int8",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit 0 done, 2 usage."""
    from pathlib import Path

    from glm_core.export.write import export, require_free, require_onnx

    require_onnx()
    require_free(Path(args.out))  # before the weights are read
    source = _quantized(args)
    path = export(
        source.model,
        args.out,
        name=source.name,
        tokenizer=source.tokenizer.sha256,
        stop=str(list(source.stop)),
        beside=source.files,
    )
    size = sum(f.stat().st_size for f in path.parent.iterdir())
    facts = {"model": str(path), "bytes": size, "bits": args.bits, "group": args.group}
    emit(args, facts, f"{path}: {size} bytes with its weights")
    return 0


def _quantized(args: argparse.Namespace) -> Any:
    import torch

    from glm_core.model.quantize import Quantization, convert
    from glm_core.pretrained.load import from_path

    how = None
    if args.bits is not None:
        how = Quantization(bits=args.bits, group=args.group, activation_bits=args.activation_bits)
    found = from_path(args.from_run, dtype=getattr(torch, args.dtype))
    if how is not None:
        for _ in convert(found.model, how):
            pass
    return adapt(args, found)
