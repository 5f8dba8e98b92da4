"""`glm-core generate`: go on from a text, or fill its blanks."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from glm_core.cli.options import add_json, emit

if TYPE_CHECKING:
    from glm_core.model.runner import Runner
    from glm_core.model.sample import Sampling
    from glm_core.pretrained.source import Source


def define(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument(
        "--onnx", metavar="DIR", help="a folder of glm-core export, run by ONNX Runtime"
    )
    add_source(parser, choice)
    parser.add_argument(
        "--prompt",
        required=True,
        metavar="TEXT",
        help="[MASK], [sMASK] and [gMASK] are blanks to fill; without one, what follows is written",
    )
    add_sampling(parser, temperature=0.0, top_p=1.0)
    parser.add_argument("--beams", type=int, metavar="N", help="beam search with N beams")
    add_json(parser)
    parser.set_defaults(run=run)


def add_model(
    parser: argparse.ArgumentParser, choice: argparse._MutuallyExclusiveGroup | None = None
) -> None:
    """Which model. choice: where it may be another's."""
    (choice or parser).add_argument(
        "--run",
        "--model",
        required=choice is None,
        metavar="DIR",
        dest="from_run",
        help="a training run, one of its checkpoints, or a checkpoint's folder of any layout",
    )
    parser.add_argument(
        "--adapter",
        metavar="PATH",
        help="LoRA or prefix to put on it: adapter.safetensors, a run that has one, or ChatGLM's "
        "prefix_encoder.*",
    )


def add_source(
    parser: argparse.ArgumentParser, choice: argparse._MutuallyExclusiveGroup | None = None
) -> None:
    """Which model, and who runs it."""
    add_model(parser, choice)
    parser.add_argument("--backend", default="cpu", metavar="NAME", help="default %(default)s")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--head-bits",
        type=int,
        metavar="N",
        help="8 or 4: logits by a copy of the head in so many bits; faster with large vocabularies",
    )


def add_sampling(parser: argparse.ArgumentParser, temperature: float, top_p: float) -> None:
    """How an answer is drawn."""
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="new tokens")
    parser.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help="0 = the likeliest token each time (default %(default)s)",
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 = all")
    parser.add_argument(
        "--top-p", type=float, default=top_p, metavar="P", help="default %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")


def adapt(args: argparse.Namespace, source: Source) -> Source:
    """Puts the adapter of the options on the model."""
    if args.adapter:
        from glm_core.pretrained.adapter_files import load_adapter

        load_adapter(args.adapter, source.model)
    return source


def opened(args: argparse.Namespace) -> Source:
    """The model of the options, on its backend's device."""
    import torch

    from glm_core.backends import registry
    from glm_core.model.quantize import quantize_head
    from glm_core.pretrained.load import from_path

    found = adapt(args, from_path(args.from_run, dtype=getattr(torch, args.dtype)))
    if args.head_bits is not None:
        quantize_head(found.model, args.head_bits)
    found.model.to(registry.usable(args.backend).device())
    return found


def exported(args: argparse.Namespace) -> tuple[Source, Runner]:
    """How an exported model is talked to, and what runs it."""
    from glm_core.errors import ConfigError
    from glm_core.pretrained.load import from_export

    if args.adapter or args.beams or args.head_bits:
        raise ConfigError(
            "generate --onnx: does not go with --adapter, --beams or --head-bits; leave it out"
        )
    return from_export(args.onnx)


def sampling(args: argparse.Namespace, stop: tuple[int, ...] = ()) -> Sampling:
    """The Sampling of the options."""
    from glm_core.model.sample import Sampling

    return Sampling(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=stop,
    )


def run(args: argparse.Namespace) -> int:
    """Exit 0 done, 1 the logits are not finite, 2 usage."""
    from glm_core.backends import registry
    from glm_core.model import prompt

    source, runner = exported(args) if args.onnx else (opened(args), None)
    settings, pieces = sampling(args, source.stop), source.tokenizer
    with registry.use(args.backend):
        if source.fills and prompt.BLANK.search(args.prompt) and not args.beams:
            from glm_core.model.generate import fill

            a = prompt.part_a(prompt.encode(args.prompt, pieces), pieces)
            answer = fill(runner or source.model, a, settings, pieces, pieces.vocab)
            text = pieces.decode(answer)
            emit(args, {"text": text}, text)
        elif args.beams:
            _beams(args, source)
        else:
            from glm_core.serve.terminal import written

            said = ""
            for piece in written(source, source.complete(args.prompt), settings, runner):
                said += piece
                if not args.json:
                    print(piece, end="", flush=True)
            emit(args, {"text": said}, "")
    return 0


def _beams(args: argparse.Namespace, source: Source) -> None:
    """Every answer with its score; of several blanks the first."""
    from glm_core.model.beam import BeamSearch, search

    settings = BeamSearch(
        num_beams=args.beams, max_tokens=args.max_tokens, seed=args.seed, stop=source.stop
    )
    found = search(source.model, source.complete(args.prompt), settings, source.tokenizer.vocab)
    answers = [{"text": source.tokenizer.decode(h.tokens), "score": h.score} for h in found]
    lines = [f"{h['score']:.3f}  {h['text']}" for h in answers]
    emit(args, {"answers": answers}, "\n".join(lines))
