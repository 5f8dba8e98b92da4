"""Implements `glm-core trace`: shows what a trace file holds, and what did not run on the
device."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from glm_core.cli.options import RESET, add_json, add_run, add_timeout, columns, emit, run_config

if TYPE_CHECKING:
    from glm_core.align.fallbacks import Fallbacks
    from glm_core.align.trace import Trace


def define(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommands."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="show what a trace file holds; needs no torch")
    show.add_argument("trace", metavar="TRACE", help="trace file")
    show.set_defaults(run=run_show)
    fallbacks = actions.add_parser(
        "fallbacks",
        help="list what did not run on the device's kernels: how often, why, and what it costs",
    )
    fallbacks.add_argument(
        "trace", nargs="?", metavar="TRACE", help="trace file; it holds counts, but no times"
    )
    fallbacks.add_argument(
        "--backend",
        metavar="NAME",
        help="instead of TRACE: run three steps on this backend, timed, host calls counted",
    )
    fallbacks.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="dtype of --backend's steps"
    )
    add_run(fallbacks)
    add_timeout(fallbacks)
    fallbacks.set_defaults(run=run_fallbacks)
    for action in (show, fallbacks):
        add_json(action)


def run_show(args: argparse.Namespace) -> int:
    """Runs `trace show`. Returns 0; raises TraceError for a file that is no trace (exit 2)."""
    from glm_core.align.trace import load

    facts = summary(load(args.trace))
    emit(args, facts, "\n".join(f"{name:16} {one_line(value)}" for name, value in facts.items()))
    return 0


def summary(trace: Trace) -> dict[str, Any]:
    """Returns the trace's facts, and how many calls, tests and parameters it holds."""
    loss = trace.loss.tolist()
    return {
        "backend": trace.backend,
        "dtype": trace.dtype,
        "steps": len(loss),
        "first_loss": loss[0] if loss else None,
        "last_loss": loss[-1] if loss else None,
        "controls": trace.control_names,
        "capture_steps": trace.capture_steps,
        "parameters": len(trace.parameters),
        "calls": len(trace.calls),
        "tests": trace.num_tests,
        "fallbacks": trace.fallbacks,
        "seconds": round(trace.seconds, 1),
        "initial_weights": trace.initial_weights,
        "data_order": trace.data_order,
        "environment": trace.environment,
        "config": trace.config,
    }


def one_line(value: Any) -> str:
    """Returns the value in one line, tables as key=value; control characters are escaped."""
    if isinstance(value, dict):
        return " ".join(f"{one_line(k)}={one_line(v)}" for k, v in value.items())
    if isinstance(value, list):
        return "; ".join(map(one_line, value)) or "none"
    text = str(value)
    return text if text.isprintable() else ascii(text)


def run_fallbacks(args: argparse.Namespace) -> int:
    """Runs `trace fallbacks`. Returns 0, whatever fell back. Raises ConfigError (exit 2) unless
    either a trace or a backend is given, and where the backend is not available (exit 3)."""
    from glm_core.errors import ConfigError

    if bool(args.trace) == bool(args.backend):
        raise ConfigError("trace fallbacks: needs either TRACE or --backend NAME; give one of them")
    from glm_core.align import fallbacks
    from glm_core.diagnose import watchdog

    if args.trace:
        from glm_core.align.trace import load

        result = fallbacks.recorded(load(args.trace))
    else:
        from glm_core.align.calibration import open_data
        from glm_core.backends import registry

        registry.usable(args.backend)
        config = run_config(args, backend=args.backend, dtype=args.dtype)
        data = open_data(config, ".cache")()
        with watchdog.guard(args.timeout, f"trace fallbacks: backend {args.backend}", RESET):
            result = fallbacks.measure(config, data, args.backend)
    emit(args, result.to_json(), table(result))
    return 0


def table(result: Fallbacks) -> str:
    """Returns one row per fallback, and notes on what is not known."""
    rows = [["op", "ran on", "calls/step", "FLOPs", "time", "why"]]
    for r in result.rows:
        shares = (share(r.flops_share), share(r.time_share))
        rows.append([r.op, r.where, f"{r.calls:g}", *shares, r.reason])
    lines = [columns(rows) if result.rows else f"{result.backend}: no fallback"]
    if not result.runtime_counted:
        way_out = "implement Backend.runtime_fallbacks" if result.step_ms else "use --backend"
        lines.append(
            f"{result.backend}: what its runtime sends to the host is not known; {way_out}"
        )
    if result.step_ms and result.ops_ms:
        lines.append(
            f"step {result.step_ms:.1f} ms; its op calls, timed alone, {result.ops_ms:.1f} ms"
        )
    return "\n".join(lines)


def share(value: float | None) -> str:
    """Returns a share as a percentage, `-` where it is not known."""
    return "-" if value is None else f"{value:.1%}"
