"""Options that several commands share, and the run they describe."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm_core.config import RunConfig


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json: one object on stdout."""
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_run(parser: argparse.ArgumentParser) -> None:
    """What determines a training run."""
    parser.add_argument("--config", metavar="FILE", help="TOML run file")
    parser.add_argument(
        "--preset", metavar="NAME", help="model preset (default tiny, unless --config)"
    )
    parser.add_argument(
        "--data", metavar="PATH", help="text, JSONL or folder (default: this machine's docs)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of weights and data order")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="any field, e.g. train.lr=3e-4",
    )


def add_quantization(
    parser: argparse.ArgumentParser,
    bits: str,
    *,
    default: int | None = None,
    rounding: str = "8: activations are rounded to int8 too",
) -> None:
    """--bits, --group, --activation-bits: the fields of a Quantization; `bits` and `rounding` are
    the help of the first and the last."""
    parser.add_argument("--bits", type=int, default=default, metavar="N", help=bits)
    parser.add_argument(
        "--group",
        type=int,
        default=0,
        metavar="N",
        help="inputs that share a scale; 0 = a row, as GLM-130B (default %(default)s)",
    )
    parser.add_argument(
        "--activation-bits",
        type=int,
        default=16,
        metavar="N",
        help=f"{rounding} (default %(default)s)",
    )


RESET = "reset the device; glm-core align bisect waits for every call and names the op"


def add_timeout(parser: argparse.ArgumentParser) -> None:
    """--timeout: nothing waits for ever."""
    parser.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="end where a step or an op call takes longer (default %(default)g; 0: never)",
    )


def words(args: argparse.Namespace) -> list[str]:
    """The options of `add_run` as they were given, for a command that runs the same again."""
    given = {k: getattr(args, k) for k in ("config", "preset", "data", "steps", "seed")}
    found = [w for k, v in given.items() if v is not None for w in (f"--{k}", str(v))]
    return found + [w for item in args.set for w in ("--set", item)]


def run_config(args: argparse.Namespace, **train: Any) -> RunConfig:
    """The RunConfig of the options; flags win over --set, which wins over the file."""
    from glm_core import config as c
    from glm_core.model.presets import preset

    base = c.load(args.config) if args.config else c.RunConfig(model=preset("tiny"))
    values = c.to_dict(base)
    if args.preset:
        values["model"] = c.to_dict(preset(args.preset))
    values = c.to_dict(c.override(c.from_dict(c.RunConfig, values), args.set))
    if args.data is not None:
        values["data"]["path"] = args.data
    flags = {"steps": args.steps, "seed": args.seed, **train}
    values["train"].update({k: v for k, v in flags.items() if v is not None})
    return c.from_dict(c.RunConfig, values)


def emit(args: argparse.Namespace, value: Any, text: str) -> None:
    """The result on stdout, as JSON where it was asked for."""
    print(json.dumps(value, ensure_ascii=False, indent=1) if args.json else text)


def columns(rows: list[list[str]]) -> str:
    """Left-aligned columns; the first row is the head."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]) - 1)]
    line = lambda r: "  ".join([c.ljust(w) for c, w in zip(r, widths, strict=False)] + r[-1:])  # noqa: E731
    return "\n".join(map(line, rows))
