"""Options that several commands share, and how results are printed."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm_core.config import RunConfig
    from glm_core.model.quantize import Quantization


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_exact(parser: argparse.ArgumentParser) -> None:
    """Adds --exact."""
    parser.add_argument(
        "--exact",
        action="store_true",
        help="give a token the same bits alone, in a batch, in training and in decoding "
        "(docs/exact.md; backends cpu, cuda and rocm)",
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds the options that determine a training run."""
    parser.add_argument("--config", metavar="FILE", help="TOML run file")
    parser.add_argument(
        "--preset", metavar="NAME", help="model preset (default tiny, unless --config)"
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="text, JSONL or folder to train on (default: this machine's documentation)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="number of optimizer steps")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of weights and data order")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="set any field of the config, e.g. train.lr=3e-4",
    )


def add_quantization(
    parser: argparse.ArgumentParser,
    bits: str,
    *,
    default: int | None = None,
    rounding: str = "8: activations are rounded to int8 too",
) -> None:
    """Adds --bits, --group and --activation-bits, the fields of a Quantization. `bits` and
    `rounding` are the help texts of the first and the last."""
    parser.add_argument("--bits", type=int, default=default, metavar="N", help=bits)
    parser.add_argument(
        "--group",
        type=int,
        default=0,
        metavar="N",
        help="inputs that share a scale; 0 = the whole row, as in GLM-130B (default %(default)s)",
    )
    parser.add_argument(
        "--activation-bits",
        type=int,
        default=16,
        metavar="N",
        help=f"{rounding} (default %(default)s)",
    )


def quantization(args: argparse.Namespace) -> Quantization | None:
    """Returns the Quantization of the options, None without --bits."""
    from glm_core.model.quantize import Quantization

    if args.bits is None:
        return None
    return Quantization(bits=args.bits, group=args.group, activation_bits=args.activation_bits)


def output_file(name: str) -> str:
    """Returns the name of a file to write, with its folder made. As the `type` of an option it
    refuses before any work what cannot be written. An empty name, a default, is no file."""
    if not name:
        return name
    place = Path(name)
    with _refused(name):
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_dir():
            raise OSError("it is a folder; name a file in it")
        _require_writable(place if place.exists() else place.parent)
    return name


def output_folder(name: str) -> str:
    """Returns the name of a folder that can be made and written to. See `output_file`."""
    place = Path(name).absolute()
    with _refused(name):
        nearest = next(p for p in (place, *place.parents) if p.exists())
        if not nearest.is_dir():
            raise OSError(f"{nearest} is no folder")
        _require_writable(nearest)
    return name


def _require_writable(place: Path) -> None:
    if not os.access(place, os.W_OK):
        raise OSError(f"{place} may not be written")


@contextmanager
def _refused(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fact = error.strerror or str(error)
        raise argparse.ArgumentTypeError(
            f"{name}: cannot be written ({fact}); choose another path"
        ) from None


RESET = "reset the device; glm-core align bisect waits for every call and names the op"
"""advice of the watchdog where a step or an op call takes too long"""


def add_timeout(parser: argparse.ArgumentParser) -> None:
    """Adds --timeout."""
    parser.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="stop if a step or an op call takes longer (default %(default)g; 0: never)",
    )


def run_words(args: argparse.Namespace) -> list[str]:
    """Returns the options of `add_run` as words of a command line that repeats them."""
    values = {k: getattr(args, k) for k in ("config", "preset", "data", "steps", "seed")}
    options = [w for k, v in values.items() if v is not None for w in (f"--{k}", str(v))]
    return options + [w for item in args.set for w in ("--set", item)]


def run_config(
    args: argparse.Namespace, default: RunConfig | None = None, **train: Any
) -> RunConfig:
    """Returns the RunConfig of the options; flags override --set, which overrides the file.
    `default` stands for a file where none is given."""
    from glm_core import config as c
    from glm_core.model.presets import preset

    base = c.load(args.config) if args.config else default or c.RunConfig(model=preset("tiny"))
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
    """Prints the result: `value` with --json, else `text`."""
    print(json.dumps(value, ensure_ascii=False, indent=1) if args.json else text)


def columns(rows: list[list[str]]) -> str:
    """Returns rows as left-aligned columns."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]) - 1)]
    padded = ([c.ljust(w) for c, w in zip(r, widths, strict=False)] + r[-1:] for r in rows)
    return "\n".join(map("  ".join, padded))
