"""`glm-core serve`: serves a model through OpenAI's API and a web page."""

from __future__ import annotations

import argparse
import socket
import sys
from typing import TYPE_CHECKING

from glm_core import environment
from glm_core.cli.generate import add_model_and_backend, load_chat_model
from glm_core.cli.memory import require_memory_options
from glm_core.errors import GlmCoreError

if TYPE_CHECKING:
    from glm_core.model.loras import LoRAs
    from glm_core.pretrained.chat_model import ChatModel

SLOTS = 16
"""slots where memory has room for them"""


def define(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_model_and_backend(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="port to listen on (default %(default)s)"
    )
    parser.add_argument(
        "--slots",
        type=int,
        metavar="N",
        help=f"requests that run at the same time (default: {SLOTS}, or as many as memory has room "
        "for)",
    )
    parser.add_argument(
        "--chunk",
        type=int,
        default=512,
        metavar="N",
        help="tokens of a prompt that are read at a time; prompts that begin alike share whole "
        "chunks (default %(default)s)",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="serve this LoRA too, a folder of the peft package or what --adapter takes; a request "
        "chooses it by `model`; may be repeated",
    )
    parser.add_argument(
        "--queue",
        type=int,
        default=256,
        metavar="N",
        help="requests that may wait; more get 429 (default %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="limit of new tokens of a request (default %(default)s)",
    )
    parser.add_argument(
        "--max-body",
        type=int,
        default=1 << 20,
        metavar="BYTES",
        help="limit of a request body (default %(default)s)",
    )
    parser.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin call the API, such as https://example.org, or '*' for all; "
        "may be repeated",
    )
    parser.epilog = (
        f"Requests need an API key if the environment variable {environment.API_KEY} is set; only "
        "the page and /health (the model's name and load) stay open."
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until SIGINT (Ctrl-C) or SIGTERM; exits 0 then, 2 on wrong usage."""
    try:
        from glm_core.serve import server
        from glm_core.serve.limits import Limits
    except ImportError as error:
        raise GlmCoreError(
            f"serve: {error.name} is not installed; pip install 'glm-core[serve]'"
        ) from None
    from glm_core.backends import registry
    from glm_core.serve.engine import Engine

    slots = SLOTS if args.slots is None else args.slots
    if min(slots, args.max_tokens, args.max_body, args.chunk) < 1 or args.queue < 0:
        raise GlmCoreError(
            "serve: --slots, --max-tokens, --max-body and --chunk must be positive, --queue at "
            "least 0"
        )
    require_memory_options(args)
    paths = lora_paths(args.lora)
    limits = Limits(
        max_tokens=args.max_tokens,
        max_body=args.max_body,
        token=environment.api_key(),
        origins=tuple(args.cors),
    )
    with bind(args.host, args.port) as listening:  # before the weights are read
        chat_model, found = load_chat_model(args, args.slots, SLOTS)
        engine = Engine(
            chat_model,
            registry.usable(args.backend),
            slots=found.slots,
            queue=args.queue,
            length=found.context,
            chunk=args.chunk,
            loras=load_loras(paths, chat_model),
            speculate=args.speculate,
            exact=args.exact,
        )
        listening.listen()  # whoever reads the address may connect
        print(
            f"{engine.chat_model.name} on http://{args.host}:{listening.getsockname()[1]}, "
            f"{engine.slots} slots of {engine.length} tokens, cache "
            f"{engine.cache_bytes / 1e6:.1f} MB",
            file=sys.stderr,
        )
        if server.is_open(listening, limits):
            print(
                f"warning: {args.host} is not this machine alone, and there is no API key: whoever "
                f"reaches it can use the model; set {environment.API_KEY}, or --host 127.0.0.1",
                file=sys.stderr,
            )
        try:
            server.Server(engine, limits).run(sockets=[listening])
        finally:
            engine.close()
    return 0


def lora_paths(options: list[str]) -> dict[str, str]:
    """Returns the paths of --lora by name. Raises GlmCoreError for another form, and for a name
    that comes twice."""
    pairs = [option.partition("=") for option in options]
    names = [name for name, _, _ in pairs]
    for option, (name, _, path) in zip(options, pairs, strict=True):
        if not name or not path or names.count(name) > 1:
            raise GlmCoreError(f"serve: --lora {option}; give NAME=PATH, each name once")
    return {name: path for name, _, path in pairs}


def load_loras(paths: dict[str, str], chat_model: ChatModel) -> LoRAs | None:
    """Returns the adapters of --lora, checked against their base. Raises ConfigError,
    CheckpointError."""
    from glm_core.model.loras import LoRAs
    from glm_core.pretrained.adapters import read, require_fits

    if chat_model.name in paths:
        raise GlmCoreError(f"serve: --lora {chat_model.name} is the model's name; choose another")
    if not paths:
        return None
    loras, base = LoRAs(chat_model.model), chat_model.model.config
    for name, path in paths.items():
        config, state = read(path, base)
        require_fits(path, base, config, state)
        loras.add(name, config, state)
    return loras


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket bound to this address, not listening yet. Raises GlmCoreError if the address
    is not available."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise GlmCoreError(
            f"serve: {host}:{port} cannot be listened on ({error}); choose another --port or --host"
        ) from None
    return bound
