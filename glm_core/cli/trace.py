"""`glm-core trace`: what a trace file holds, and what did not run on the device."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from glm_core.cli.options import RESET, add_json, add_run, add_timeout, columns, emit, run_config

if TYPE_CHECKING:
    from glm_core.align.fallbacks import Fallbacks
    from glm_core.align.trace import Trace


def define(parser: argparse.ArgumentParser) -> None:
    """Its subcommands."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="what a trace file holds; needs no torch")
    show.add_argument("trace", metavar="TRACE")
    show.set_defaults(run=run_show)
    fallbacks = actions.add_parser(
        "fallbacks", help="what did not run on the device: how often, why, and what it costs"
    )
    fallbacks.add_argument("trace", nargs="?", metavar="TRACE", help="as recorded, without times")
    fallbacks.add_argument(
        "--backend",
        metavar="NAME",
        help="or three steps on this backend, timed, host calls counted",
    )
    fallbacks.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of --backend's steps"
    )
    add_run(fallbacks)
    add_timeout(fallbacks)
    fallbacks.set_defaults(run=run_fallbacks)
    for action in (show, fallbacks):
        add_json(action)


def run_show(args: argparse.Namespace) -> int:
    """Exits 0; 2 for a file that is no trace."""
    from glm_core.align.trace import load

    facts = summary(load(args.trace))
    emit(args, facts, "\n".join(f"{name:16} {plain(value)}" for name, value in facts.items()))
    return 0


def summary(trace: Trace) -> dict[str, Any]:
    """The trace's facts and how much it holds of each kind."""
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


def plain(value: Any) -> str:
    """One line, tables as key=value; what would drive the terminal is escaped."""
    if isinstance(value, dict):
        return " ".join(f"{plain(k)}={plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        return "; ".join(map(plain, value)) or "none"
    text = str(value)
    return text if text.isprintable() else ascii(text)


def run_fallbacks(args: argparse.Namespace) -> int:
    """Exits 0, whatever fell back; 2 unless given either a trace or a backend; 3 for a backend that
    is not available."""
    from glm_core.errors import ConfigError

    if bool(args.trace) == bool(args.backend):
        raise ConfigError("trace fallbacks: needs either TRACE or --backend NAME; give one of them")
    from glm_core.align import fallbacks
    from glm_core.diagnose import watchdog

    if args.trace:
        from glm_core.align.trace import load

        found = fallbacks.recorded(load(args.trace))
    else:
        from glm_core.align.calibration import open_data
        from glm_core.backends import registry

        registry.usable(args.backend)
        config = run_config(args, backend=args.backend, dtype=args.dtype)
        data = open_data(config, ".cache")()
        with watchdog.guard(args.timeout, f"trace fallbacks: backend {args.backend}", RESET):
            found = fallbacks.measure(config, data, args.backend)
    emit(args, found.to_json(), table(found))
    return 0


def table(found: Fallbacks) -> str:
    """One row a fallback, and what is not known."""
    rows = [["op", "ran on", "calls/step", "FLOPs", "time", "why"]]
    for r in found.rows:
        shares = (share(r.flops_share), share(r.time_share))
        rows.append([r.op, r.where, f"{r.calls:g}", *shares, r.reason])
    notes = [columns(rows) if found.rows else f"{found.backend}: no fallback"]
    if not found.runtime_counted:
        known = "Backend.runtime_fallbacks" if found.step_ms else "--backend"
        notes.append(
            f"{found.backend}: what its runtime sends to the host is not known; {known} tells"
        )
    if found.step_ms and found.ops_ms:
        notes.append(f"step {found.step_ms:.1f} ms; its op calls timed alone {found.ops_ms:.1f} ms")
    return "\n".join(notes)


def share(value: float | None) -> str:
    """Percent."""
    return "-" if value is None else f"{value:.1%}"
