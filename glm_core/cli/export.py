"""`glm-core export`: writes a model as an ONNX file with a KV cache."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from glm_core.cli.generate import add_model, attach_adapter
from glm_core.cli.options import add_json, add_quantization, emit, output_folder, quantization

if TYPE_CHECKING:
    from glm_core.pretrained.chat_model import ChatModel


def define(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_model(parser)
    parser.add_argument(
        "out", type=output_folder, metavar="OUT", help="new folder for model.onnx and its weights"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="only float32 can be exported (default %(default)s)",
    )
    add_quantization(
        parser,
        "store the four linears of a layer as int8 or int4 codes, for MatMulNBits",
        rounding="8: ONNX Runtime may round activations to int8",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exports; exits 0, or 2 on wrong usage."""
    from pathlib import Path

    from glm_core.export.write import export, require_free, require_onnx

    require_onnx()
    require_free(Path(args.out))  # before the weights are read
    chat_model = _load(args)
    path = export(
        chat_model.model,
        args.out,
        name=chat_model.name,
        tokenizer=chat_model.tokenizer.sha256,
        stop=str(list(chat_model.stop)),
        copied_files=chat_model.files,
    )
    size = sum(f.stat().st_size for f in path.parent.iterdir())
    facts = {"model": str(path), "bytes": size, "bits": args.bits, "group": args.group}
    emit(args, facts, f"{path}: {size} bytes with its weights")
    return 0


def _load(args: argparse.Namespace) -> ChatModel:
    """Loads the model of the options, quantized and with its adapter."""
    import torch

    from glm_core.model.quantize import convert
    from glm_core.pretrained.load import from_path

    how = quantization(args)  # before the weights are read
    chat_model = from_path(args.model, dtype=getattr(torch, args.dtype))
    if how is not None:
        for _ in convert(chat_model.model, how):
            pass
    attach_adapter(args, chat_model.model)
    return chat_model
