"""`glm-core quantize`: quantizes a trained model to int8 or int4, and reports its size, the error
of each matrix, perplexity and exact matches."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_core.cli.options import add_json, add_quantization, columns, emit

if TYPE_CHECKING:
    from glm_core.config import RunConfig
    from glm_core.model.glm import GLM
    from glm_core.model.quantize import Quantization


def define(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("run_folder", metavar="RUN", help="the folder that `glm-core train` wrote")
    add_quantization(parser, "bits of a weight, 8 or 4 (default %(default)s)", default=4)
    parser.add_argument(
        "--backend",
        default="cpu",
        metavar="NAME",
        help="backend that runs the ops (default %(default)s)",
    )
    parser.add_argument(
        "--sequences",
        type=int,
        default=64,
        metavar="N",
        help="sequences to measure on, from the run's own text with another seed (default "
        "%(default)s)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="write the quantized model there, with its tokenizer"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Quantizes; exits 0, or 2 if the options or the run do not fit."""
    from glm_core.backends import registry
    from glm_core.data.open import open_sampler
    from glm_core.errors import CheckpointError
    from glm_core.model.quantize import Quantization, convert, model_bytes
    from glm_core.training.quality import score

    how = Quantization(bits=args.bits, group=args.group, activation_bits=args.activation_bits)
    if args.out and Path(args.out).exists():
        raise CheckpointError(f"{args.out}: exists; choose a new folder")
    model, config = _load(args.run_folder)
    seed = config.train.seed + 1  # other blanks and another order than in training
    sampler = open_sampler(config.data, seed, ".cache", positions=config.model.positions)
    batches = [sampler.next(8) for _ in range(max(args.sequences // 8, 1))]
    with registry.use(args.backend):
        before, size = score(model, batches), model_bytes(model)
        layers = list(convert(model, how))
        after = score(model, batches)
    facts = {
        "bits": how.bits,
        "group": how.group,
        "activation_bits": how.activation_bits,
        "targets": before.targets,
        "before": {**before._asdict(), **size},
        "after": {**after._asdict(), **model_bytes(model)},
        "layers": [layer._asdict() for layer in layers],
    }
    if args.out:
        facts["files"] = _write(args.run_folder, args.out, config, how)
    emit(args, facts, _text(facts))
    return 0


def _write(folder: str, out: str, config: RunConfig, how: Quantization) -> list[str]:
    """Writes the run's latest weights, quantized, as a checkpoint of layout glm-core; returns the
    files."""
    import shutil

    import torch

    from glm_core.pretrained.weights.reading import open_checkpoint
    from glm_core.pretrained.weights.writing import convert, target
    from glm_core.training import checkpoint

    file = checkpoint.find(Path(folder))
    form = target("glm-core", quantize=how, dtype=getattr(torch, config.train.dtype))
    files = convert(open_checkpoint(file, config.model), out, form)
    tokenizer = file.parent.parent / checkpoint.TOKENIZER
    if tokenizer.is_file():
        files.append(Path(shutil.copy(tokenizer, out)))
    return [str(f) for f in files]


def _load(folder: str) -> tuple[GLM, RunConfig]:
    """Returns the model of a run's latest checkpoint in the run's dtype, and the run's config."""
    import torch

    from glm_core.pretrained.load import load_run_model
    from glm_core.training import checkpoint

    model, config, _ = load_run_model(checkpoint.find(Path(folder)))
    return model.to(getattr(torch, config.train.dtype)), config


def _text(facts: dict[str, Any]) -> str:
    """Returns the report for people."""
    rows = [["matrix", "error", "bytes"]]
    rows += [[x["name"], f"{x['error']:.4f}", str(x["bytes_after"])] for x in facts["layers"]]
    old, new = facts["before"], facts["after"]
    return "\n".join(
        [
            columns(rows),
            f"bytes: {old['total_bytes']} -> {new['total_bytes']}, "
            f"linears {old['linears_bytes']} -> {new['linears_bytes']}",
            f"perplexity: {old['perplexity']:.3f} -> {new['perplexity']:.3f} "
            f"({new['perplexity'] / old['perplexity'] - 1:+.2%})",
            f"exact match: {old['exact']:.4f} -> {new['exact']:.4f} of {facts['targets']} targets",
            *(f"written: {file}" for file in facts.get("files", ())),
        ]
    )
