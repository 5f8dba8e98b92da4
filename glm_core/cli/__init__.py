"""The command line: one module per command. Only the command that runs imports torch."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence

from glm_core import __version__, environment, errors
from glm_core.cli.exits import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_UNAVAILABLE, EXIT_USAGE

COMMANDS = {
    "devices": "list the backends: usable here or not, and how each was verified",
    "ops": "table of ops x backends: kernel, reference or unsupported",
    "train": "train a GLM, or an adapter beside a frozen base",
    "launch": "run a script on every slot of one host or of a hostfile",
    "generate": "continue a text, or fill its blanks, with a trained model",
    "chat": "chat with a trained model in the terminal",
    "serve": "serve a trained model through OpenAI's API and a web page",
    "align": "compare loss curves across backends: run, record, compare, bisect, sensitivity",
    "verdict": "judge any PyTorch script: is every operator of a training step computed right?",
    "checkpoint": "inspect checkpoints of other projects; convert them, merge or cut shards",
    "quantize": "quantize a trained model to int8 or int4: size, error, perplexity",
    "export": "write a trained model as an ONNX file with a KV cache, int8 or int4 on request",
    "conformance": "check every op of a backend against the float64 reference, case by case",
    "backend": "create the package of a new backend",
    "bench": "measure this machine: ceilings, ops, training step, decode, links; compare runs",
    "plan": "estimate a model on a cluster: plans, memory, step time, days",
    "doctor": "report everything about one backend on this device in one file to send back",
    "trace": "print what a trace holds, and what did not run on the device",
}


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line; needs no torch."""
    top = argparse.ArgumentParser(
        prog="glm-core",
        description="GLM on any hardware, with loss curves that align.",
        epilog="exit codes: 0 good, 1 the check failed, 2 wrong usage, 3 backend not available, "
        "130 interrupted",
    )
    top.add_argument("--version", action="version", version=f"glm-core {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"glm_core.cli.{name}")
        module.define(commands.add_parser(name, help=text, description=text))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; a GlmCoreError becomes one line on stderr."""
    args = parser().parse_args(argv)
    args.command_line = shlex.join(["glm-core", *(sys.argv[1:] if argv is None else argv)])
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
    """Prints an error as one line on stderr and returns the exit code."""
    print(f"glm-core: {error}", file=sys.stderr)
    return code
