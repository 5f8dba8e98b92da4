"""`glm-core generate`: continues a text, or fills its blanks."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from glm_core.cli.memory import add_memory, load_within_memory, require_memory_options
from glm_core.cli.options import add_exact, add_json, emit

if TYPE_CHECKING:
    from glm_core.model.fit import Fit
    from glm_core.model.glm import GLM
    from glm_core.model.runner import Runner
    from glm_core.model.sample import Sampling
    from glm_core.pretrained.chat_model import BlankFillingModel, ChatModel
    from glm_core.pretrained.weights.reading import Checkpoint


def define(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument(
        "--onnx", metavar="DIR", help="a folder of glm-core export, computed by ONNX Runtime"
    )
    add_model_and_backend(parser, choice)
    parser.add_argument(
        "--prompt",
        required=True,
        metavar="TEXT",
        help="[MASK], [sMASK] and [gMASK] are blanks to fill; a text without blanks is continued",
    )
    add_sampling(parser, temperature=0.0, top_p=1.0)
    parser.add_argument("--beams", type=int, metavar="N", help="beam search with N beams")
    add_json(parser)
    parser.set_defaults(run=run)


def add_model(
    parser: argparse.ArgumentParser, choice: argparse._MutuallyExclusiveGroup | None = None
) -> None:
    """Adds --model and --adapter. choice: the group of options that exclude --model."""
    (choice or parser).add_argument(
        "--run",
        "--model",
        required=choice is None,
        metavar="DIR",
        dest="model",
        help="a training run, one of its checkpoints, or a checkpoint of any layout (its folder or "
        "file) with its tokenizer",
    )
    parser.add_argument(
        "--adapter",
        metavar="PATH",
        help="LoRA or prefix to attach: adapter.safetensors, a run that has one, a folder of the "
        "peft package, or ChatGLM's prefix_encoder.*",
    )


def add_model_and_backend(
    parser: argparse.ArgumentParser, choice: argparse._MutuallyExclusiveGroup | None = None
) -> None:
    """Adds the options of a model, its backend and its dtype."""
    add_model(parser, choice)
    parser.add_argument(
        "--backend",
        default="cpu",
        metavar="NAME",
        help="backend that runs the ops (default %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of weights and arithmetic (default %(default)s)",
    )
    add_exact(parser)
    parser.add_argument(
        "--head-bits",
        type=int,
        metavar="N",
        help="8 or 4: compute logits with a copy of the head in 8 or 4 bits; faster with large "
        "vocabularies",
    )
    parser.add_argument(
        "--speculate",
        type=int,
        default=0,
        metavar="N",
        help="draft N tokens at a time with the model's layer of multi-token prediction and check "
        "them in one step; the tokens stay the same (default %(default)s: no drafts)",
    )
    add_memory(parser)


def add_sampling(parser: argparse.ArgumentParser, temperature: float, top_p: float) -> None:
    """Adds the options of sampling."""
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=256,
        metavar="N",
        help="limit of new tokens (default %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help="0 = always the most likely token (default %(default)s)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="draw from the K most likely tokens; 0 = from all (default)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=top_p,
        metavar="P",
        help="draw from the most likely tokens that together have probability P (default "
        "%(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the sampling (default %(default)s)",
    )


def attach_adapter(args: argparse.Namespace, model: GLM) -> None:
    """Attaches the adapter of --adapter, if there is one."""
    if args.adapter:
        from glm_core.pretrained.adapters import load_adapter

        load_adapter(args.adapter, model)


def load_chat_model(
    args: argparse.Namespace, slots: int | None = 1, most_slots: int = 1
) -> tuple[ChatModel, Fit]:
    """Loads the model of the options, with its adapter, onto the backend's device; and decides what
    the cache holds, before any weight is read. slots: None: as many as fit, up to `most_slots`."""
    import torch

    from glm_core.backends import registry
    from glm_core.model.quantize import quantize_head
    from glm_core.pretrained.load import from_path

    require_memory_options(args)
    backend = registry.usable(args.backend)
    registry.require_values(backend)
    if args.exact:
        registry.require_exact(backend, args.dtype, (), plan=False)
    device = backend.device()
    fits: list[Fit] = []

    def build(weights: Checkpoint) -> GLM:
        model, found = load_within_memory(args, weights, device, slots, most_slots)
        fits.append(found)
        return model

    chat_model = from_path(args.model, getattr(torch, args.dtype), build)
    attach_adapter(args, chat_model.model)
    if args.head_bits is not None:
        quantize_head(chat_model.model, args.head_bits)
    chat_model.model.to(device)
    return chat_model, fits[0]


def load_runner(args: argparse.Namespace) -> tuple[ChatModel, Runner]:
    """Loads the model of the options, and its runner with a slot for each beam."""
    from glm_core.model.runner import Runner

    slots = max(getattr(args, "beams", None) or 1, 1)
    chat_model, found = load_chat_model(args, slots)
    runner = Runner(chat_model.model, slots, found.context, speculate=args.speculate)
    return chat_model, runner


def load_export(args: argparse.Namespace) -> tuple[ChatModel, Runner]:
    """Loads the chat format of an exported model, and the runner that computes it."""
    from glm_core.errors import ConfigError
    from glm_core.pretrained.load import from_export

    others = ("adapter", "beams", "bits", "head_bits", "context", "memory", "offload", "speculate")
    if any(getattr(args, name) for name in others):
        raise ConfigError(
            "generate --onnx: cannot be combined with --adapter, --beams, --bits, --head-bits, "
            "--context, --memory, --offload or --speculate; leave these out"
        )
    return from_export(args.onnx)


def report_drafts(runner: Runner) -> None:
    """Prints how many drafts were right, where there were any."""
    if runner.drafted:
        print(
            f"speculate: {runner.accepted} of {runner.drafted} drafted tokens were right",
            file=sys.stderr,
        )


def sampling(args: argparse.Namespace, stop: tuple[int, ...] = ()) -> Sampling:
    """Returns the sampling settings of the options."""
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
    """Generates; exits 0, 1 if logits are not finite or the device fails, 2 on wrong usage."""
    from glm_core.backends import registry
    from glm_core.diagnose.device_errors import GENERATION_MEMORY, explained
    from glm_core.model import prompt
    from glm_core.pretrained.chat_model import BlankFillingModel

    with (
        explained(args.backend, "generate", GENERATION_MEMORY),
        registry.use(args.backend, exact=args.exact),
    ):
        chat_model, runner = load_export(args) if args.onnx else load_runner(args)
        if args.beams:
            _beam_search(args, chat_model, runner)
        elif isinstance(chat_model, BlankFillingModel) and prompt.BLANK.search(args.prompt):
            _fill_blanks(args, chat_model, runner)
        else:
            _continue_text(args, chat_model, runner)
        report_drafts(runner)
    return 0


def _fill_blanks(args: argparse.Namespace, chat_model: BlankFillingModel, runner: Runner) -> None:
    """Prints the text with all its blanks filled."""
    from glm_core.model.generate import fill
    from glm_core.model.prompt import encode, part_a

    tokenizer, settings = chat_model.tokenizer, sampling(args, chat_model.stop)
    a = part_a(encode(args.prompt, tokenizer), tokenizer)
    filled = fill(runner, a, settings, tokenizer, tokenizer.vocab)
    text = tokenizer.decode(filled)
    emit(args, {"text": text}, text)


def _continue_text(args: argparse.Namespace, chat_model: ChatModel, runner: Runner) -> None:
    """Prints what follows the text, while it is generated."""
    from glm_core.serve.terminal import stream_text

    settings, text = sampling(args, chat_model.stop), ""
    for part in stream_text(
        chat_model, chat_model.completion_prompt(args.prompt), settings, runner
    ):
        text += part
        if not args.json:
            print(part, end="", flush=True)
    emit(args, {"text": text}, "")


def _beam_search(args: argparse.Namespace, chat_model: ChatModel, runner: Runner) -> None:
    """Prints the hypotheses with their scores; of several blanks only the first is filled."""
    from glm_core.model.beam import BeamSearch, search

    settings = BeamSearch(
        num_beams=args.beams, max_tokens=args.max_tokens, seed=args.seed, stop=chat_model.stop
    )
    prompt, tokenizer = chat_model.completion_prompt(args.prompt), chat_model.tokenizer
    hypotheses = search(runner, prompt, settings, tokenizer.vocab)
    answers = [{"text": tokenizer.decode(h.tokens), "score": h.score} for h in hypotheses]
    lines = [f"{h['score']:.3f}  {h['text']}" for h in answers]
    emit(args, {"answers": answers}, "\n".join(lines))
