"""`glm-core quantize`: quantizes a trained model to int8 or int4, and reports its size, the error
of each matrix, perplexity and exact matches."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_core.cli.options import add_json, add_quantization, columns, emit, output_folder

if TYPE_CHECKING:
    from glm_core.config import RunConfig
    from glm_core.pretrained.weights.reading import Checkpoint


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
        "--out",
        type=output_folder,
        metavar="DIR",
        help="write the quantized model there, with its tokenizer",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Quantizes; exits 0, or 2 if the options or the run do not fit."""
    import torch

    from glm_core.backends import registry
    from glm_core.data.open import open_sampler
    from glm_core.errors import CheckpointError
    from glm_core.model.quantize import Quantization, convert, model_bytes
    from glm_core.pretrained.weights.writing import convert as write
    from glm_core.pretrained.weights.writing import target
    from glm_core.training.quality import score

    how = Quantization(bits=args.bits, group=args.group, activation_bits=args.activation_bits)
    if args.out and Path(args.out).exists():
        raise CheckpointError(f"{args.out}: exists; choose a new folder")
    source, config = _open(args.run_folder)
    dtype = getattr(torch, config.train.dtype)
    seed = config.train.seed + 1  # other blanks and another order than in training
    sampler = open_sampler(config.data, seed, ".cache", positions=config.model.positions)
    batches = [sampler.next(8) for _ in range(max(args.sequences // 8, 1))]
    with registry.use(args.backend):
        model = source.load(dtype)
        before, size = score(model, batches), model_bytes(model)
        model = source.load().requires_grad_(False)  # codes are made of the float32 masters
        layers = list(convert(model, how))
        after = score(model.to(dtype), batches)
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
        form = target("glm-core", quantize=how, dtype=dtype)
        files = write(source, args.out, form)
        facts["files"] = {str(file): file.stat().st_size for file in files}
    emit(args, facts, _text(facts))
    return 0


def _open(folder: str) -> tuple[Checkpoint, RunConfig]:
    """Opens a run's latest checkpoint, and returns it with the run's config. Raises CheckpointError
    for what is no run."""
    from glm_core import config
    from glm_core.errors import CheckpointError
    from glm_core.pretrained.weights import runs
    from glm_core.pretrained.weights.reading import open_checkpoint

    source = open_checkpoint(folder)
    file = source.files.config_file
    if file is None or (settings := runs.run_config(file)) is None:
        raise CheckpointError(
            f"{folder}: a checkpoint, not a training run, so there is no text to measure on; use "
            f"glm-core checkpoint convert {folder} OUT --to glm-core --bits 4"
        )
    return source, config.from_dict(config.RunConfig, settings)


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
            *(f"written: {file}, {size} bytes" for file, size in facts.get("files", {}).items()),
        ]
    )
