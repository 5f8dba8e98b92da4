"""`glm-core chat`: chats with a model in the terminal."""

from __future__ import annotations

import argparse

from glm_core.cli.generate import (
    add_model_and_backend,
    add_sampling,
    load_runner,
    report_drafts,
    sampling,
)


def define(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options; the sampling defaults are those of ChatGLM-6B's chat."""
    add_model_and_backend(parser)
    add_sampling(parser, temperature=0.95, top_p=0.7)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Chats; exits 0 at the end of the conversation, 1 if logits are not finite or the device
    fails, 2 on wrong usage."""
    import sys

    from glm_core.backends import registry
    from glm_core.diagnose.device_errors import GENERATION_MEMORY, explained
    from glm_core.serve import terminal

    with (
        explained(args.backend, "chat", GENERATION_MEMORY),
        registry.use(args.backend, exact=args.exact),
    ):
        chat_model, runner = load_runner(args)
        terminal.chat(chat_model, sampling(args), sys.stdin, sys.stdout, runner)
        report_drafts(runner)
    return 0
