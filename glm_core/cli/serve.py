"""`glm-core serve`: a model behind OpenAI's API and a web page."""

from __future__ import annotations

import argparse
import socket
import sys

from glm_core import environment
from glm_core.cli.generate import add_source, opened
from glm_core.errors import GlmCoreError


def define(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_source(parser)
    parser.add_argument("--host", default="127.0.0.1", help="default %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default %(default)s")
    parser.add_argument(
        "--slots", type=int, default=16, metavar="N", help="requests at a time (%(default)s)"
    )
    parser.add_argument(
        "--queue",
        type=int,
        default=256,
        metavar="N",
        help="requests that may wait; more get 429 (default %(default)s)",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=1024, metavar="N", help="most new tokens of a request"
    )
    parser.add_argument(
        "--max-body", type=int, default=1 << 20, metavar="BYTES", help="longest request body"
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens of a slot (default: the model's context)"
    )
    parser.epilog = f"An API key is asked for if the environment has {environment.API_KEY}."
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until it is interrupted; exit 0, 2 usage."""
    try:
        import uvicorn

        from glm_core.serve import api
    except ImportError as error:
        raise GlmCoreError(
            f"serve: {error.name} is not installed; pip install 'glm-core[serve]'"
        ) from None
    from glm_core.backends import registry
    from glm_core.serve.engine import Engine

    if min(args.slots, args.max_tokens, args.max_body) < 1 or args.queue < 0:
        raise GlmCoreError(
            "serve: --slots, --max-tokens and --max-body must be positive, --queue not negative"
        )
    if args.context is not None and args.context < 2:
        raise GlmCoreError(f"serve: --context {args.context} has no room; give 2 tokens or more")
    limits = api.Limits(
        max_tokens=args.max_tokens, max_body=args.max_body, token=environment.api_key()
    )
    with bound(args.host, args.port) as listening:  # before the weights are read
        engine = Engine(
            opened(args),
            registry.usable(args.backend),
            slots=args.slots,
            queue=args.queue,
            length=args.context,
        )
        print(
            f"{engine.source.name} on http://{args.host}:{listening.getsockname()[1]}, "
            f"{engine.slots} slots of {engine.length} tokens, cache "
            f"{engine.cache_bytes / 1e6:.1f} MB",
            file=sys.stderr,
        )
        settings = uvicorn.Config(
            api.app(engine, limits), log_level="warning", timeout_graceful_shutdown=5
        )
        try:
            uvicorn.Server(settings).run(sockets=[listening])
        except KeyboardInterrupt:
            pass
        finally:
            engine.close()
    return 0


def bound(host: str, port: int) -> socket.socket:
    """A socket with this address, not listening yet. Raises GlmCoreError where it cannot be had."""
    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
    except (OSError, OverflowError) as error:
        taken.close()
        raise GlmCoreError(
            f"serve: {host}:{port} cannot be listened on ({error}); choose another --port or --host"
        ) from None
    return taken
