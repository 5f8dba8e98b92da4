"""`glm-core chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse

from glm_core.cli.generate import add_sampling, add_source, opened, sampling


def define(parser: argparse.ArgumentParser) -> None:
    """Its options; the defaults are those of ChatGLM-6B's chat."""
    add_source(parser)
    add_sampling(parser, temperature=0.95, top_p=0.7)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit 0 at the end of the conversation, 1 the logits are not finite, 2 usage."""
    import sys

    from glm_core.backends import registry
    from glm_core.serve.terminal import talk

    with registry.use(args.backend):
        talk(opened(args), sampling(args), sys.stdin, sys.stdout)
    return 0
