"""The command line: one module per command; torch is imported only by the command that runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from glm_core import __version__, environment, errors
from glm_core.cli.exits import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_UNAVAILABLE, EXIT_USAGE

COMMANDS = {
    "devices": "backends, usable here or not, and how far each was ever verified",
    "ops": "ops x backends: kernel, reference or unsupported",
    "train": "train a GLM on one backend",
    "launch": "run a script on every slot of one host or of a hostfile",
    "generate": "go on from a text, or fill its blanks, with a trained model",
    "chat": "talk to a trained model in the terminal",
    "serve": "a trained model behind OpenAI's API and a web page",
    "align": "loss curves across backends: run, record, compare, bisect, sensitivity",
    "checkpoint": "what other projects' checkpoints hold; rewrite them, merge or cut shards",
    "quantize": "a trained model with int8 or int4 weights: size, error, perplexity",
    "export": "a trained model as an ONNX file with a KV cache, int4 if wanted",
    "conformance": "every op of a backend against the float64 reference, case by case",
    "backend": "start a new backend's package",
    "bench": "what this machine reaches: ceilings, ops, training step, decode, links; compare runs",
    "plan": "what a model would take on a cluster: plans, memory, step time, days",
    "doctor": "everything about one backend on this device, in one file to send back",
    "trace": "what a trace holds, what did not run on the device",
}


def parser() -> argparse.ArgumentParser:
    """The whole command line, built without torch."""
    top = argparse.ArgumentParser(
        prog="glm-core",
        description="GLM on any hardware, with loss curves that align.",
        epilog="exit codes: 0 good, 1 the check failed, 2 usage, 3 backend not available",
    )
    top.add_argument("--version", action="version", version=f"glm-core {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"glm_core.cli.{name}")
        module.define(commands.add_parser(name, help=text, description=text))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; deliberate errors become one line on stderr and an exit code."""
    args = parser().parse_args(argv)
    try:
        environment.check()
        return int(args.run(args))
    except errors.BackendUnavailableError as error:
        return fail(error, EXIT_UNAVAILABLE)
    except (errors.TrainingError, errors.GenerationError) as error:
        return fail(error, EXIT_FAILED)
    except errors.GlmCoreError as error:
        return fail(error, EXIT_USAGE)
    except KeyboardInterrupt:
        return fail(errors.GlmCoreError("interrupted"), EXIT_INTERRUPTED)


def fail(error: Exception, code: int) -> int:
    """One line on stderr."""
    print(f"glm-core: {error}", file=sys.stderr)
    return code
