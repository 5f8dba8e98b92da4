"""Describes the cluster that a plan runs on: its chips and links, from a preset or a JSON file with
units."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from glm_core.errors import ConfigError, unknown

UNITS: dict[str, dict[str, float]] = {
    "peak": {"GFLOPS": 1e9, "TFLOPS": 1e12, "PFLOPS": 1e15},
    "memory": {"GB": 1e9, "GiB": 2.0**30},
    "memory_bandwidth": {"GB/s": 1e9, "TB/s": 1e12},
    "link_within_node": {"GB/s": 1e9, "Gbit/s": 1e9 / 8},
    "link_between_nodes": {"GB/s": 1e9, "Gbit/s": 1e9 / 8},
    "power": {"W": 1.0, "kW": 1e3},
}
"""by field of a cluster file: the units it may have, in FLOP/s, bytes, bytes/s and watts"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Equal chips in equal nodes. A link's rate is that of one chip in one direction."""

    name: str
    chips: int
    chips_per_node: int
    peak: float
    """FLOP/s of dense products in the working dtype"""
    memory: float
    """bytes of a chip"""
    memory_bandwidth: float
    """bytes/s of a chip"""
    link_within_node: float
    """bytes/s"""
    link_between_nodes: float
    """bytes/s"""
    power: float
    """watts of a chip under load"""
    family: str
    """chip family whose fitted efficiencies apply: A100, H100, ..."""
    source: str
    """where the figures come from and which of them are assumed"""


def _chip(
    peak: float,
    memory: float,
    bandwidth: float,
    links: tuple[float, float],
    per_node: int,
    power: float,
    family: str,
    source: str,
) -> dict[str, Any]:
    """Returns a preset from its figures in TFLOPS, GB, GB/s, GB/s (within and between nodes) and
    W."""
    return {
        "peak": peak * 1e12,
        "memory": memory * 1e9,
        "memory_bandwidth": bandwidth * 1e9,
        "link_within_node": links[0] * 1e9,
        "link_between_nodes": links[1] * 1e9,
        "chips_per_node": per_node,
        "power": power,
        "family": family,
        "source": source,
    }


_NVIDIA = "NVIDIA data sheet; DGX with one 200 Gbit/s (A100) or 400 Gbit/s (H100) port a chip"
CHIPS: dict[str, dict[str, Any]] = {
    "A100-40G": _chip(312, 40, 1555, (300, 25), 8, 400, "A100", _NVIDIA),
    "A100-80G": _chip(312, 80, 2039, (300, 25), 8, 400, "A100", _NVIDIA),
    "A100-80G-OPA": _chip(
        312,
        80,
        2039,
        (300, 6.25),
        8,
        400,
        "A100",
        "Jean Zay: four 100 Gbit/s Omni-Path links a node of 8 (BLOOM, arXiv:2211.05100)",
    ),
    "H100": _chip(989, 80, 3350, (450, 50), 8, 700, "H100", _NVIDIA),
    "TPU-v4": _chip(
        275,
        32,
        1228,
        (150, 150),
        4,
        192,
        "TPU",
        "Jouppi et al. 2023, table 4; links assumed: three of six torus links in use",
    ),
    "Hygon-DCU": _chip(
        21,
        16,
        1000,
        (25, 6.25),
        4,
        300,
        "Hygon",
        "peak implied by the GLM slides (fp16); memory, bandwidth, links and power assumed",
    ),
    "Ascend-910A": _chip(
        256,
        32,
        1229,
        (30, 12.5),
        8,
        310,
        "Ascend",
        "Huawei 23 August 2019; three HCCS ports of 240 Gbit/s, 100 Gbit/s RoCE; bandwidth derived",
    ),
    "Ascend-910B": _chip(
        313,
        64,
        1759,
        (196, 25),
        8,
        400,
        "Ascend",
        "Ascend/msmodeling tensor_cast/device.py, ATLAS_800_A2_313T_64G; links and power assumed",
    ),
    "Sunway-node": _chip(
        54,
        96,
        307,
        (7, 7),
        1,
        400,
        "Sunway",
        "peak implied by the GLM slides; memory, bandwidth, links and power assumed",
    ),
    "CPU": _chip(
        0.415,
        24,
        29.4,
        (5, 1),
        1,
        100,
        "CPU",
        "bfloat16 GEMM and read ceilings measured on two virtual Zen 4 cores; the rest assumed",
    ),
}


def preset(name: str, chips: int) -> Cluster:
    """Returns a cluster of `chips` chips of a preset. Raises ConfigError."""
    if name not in CHIPS:
        raise ConfigError(unknown("chip", name, CHIPS))
    return checked({**CHIPS[name], "name": name, "chips": chips})


def load(path: str | Path) -> Cluster:
    """Reads a cluster file: JSON with `chips`, and either `chip` (a preset, whose figures may be
    overridden) or every figure with its unit: {"chip": "A100-40G", "chips": 768,
    "link_between_nodes": "25 GB/s"}. Raises ConfigError that lists everything wrong."""
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cluster file {path}: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"cluster file {path}: must hold one JSON object")
    chip = fields.pop("chip", None)
    if chip is not None and chip not in CHIPS:
        raise ConfigError(f"cluster file {path}: " + unknown("chip", str(chip), CHIPS))
    base = dict(CHIPS.get(chip or "", {}))
    base |= {"name": chip or Path(path).stem}
    base.setdefault("family", "other")
    base.setdefault("source", f"cluster file {Path(path).name}")
    wrong = [fact for key, value in fields.items() if (fact := _read(base, key, value))]
    names = [f.name for f in dataclasses.fields(Cluster)]
    wrong += [f"{key} is missing" for key in names if key not in base and key not in fields]
    if wrong:
        raise ConfigError(f"cluster file {path}: " + "; ".join(wrong))
    return checked(base)


def _read(into: dict[str, Any], key: str, value: Any) -> str:
    """Converts one field and puts it into `into`. Returns what is wrong with it, or ''."""
    if key in ("chips", "chips_per_node"):
        whole = isinstance(value, int) and not isinstance(value, bool)
        into[key] = value
        return "" if whole else f"{key}={value!r} must be a whole number"
    if key in ("name", "family", "source"):
        into[key] = str(value)
        return ""
    if key not in UNITS:
        return unknown("key", key, [f.name for f in dataclasses.fields(Cluster)] + ["chip"])
    number = re.fullmatch(r"\s*([0-9.eE+-]+)\s*([A-Za-z/]*)\s*", str(value))
    units = " or ".join(UNITS[key])
    if number is None or number[2] not in UNITS[key]:
        return f'{key}={value!r} needs a number and its unit, {units}: "{_example(value)} {units}"'
    try:
        into[key] = float(number[1]) * UNITS[key][number[2]]
    except ValueError:
        return f"{key}={value!r} is not a number"
    return ""


def _example(value: Any) -> str:
    number = re.match(r"[0-9.]+", str(value))
    return number[0] if number else "300"


def checked(facts: dict[str, Any]) -> Cluster:
    """Returns the cluster. Raises ConfigError that lists every figure which contradicts another or
    is not positive."""
    wrong = [
        f"{key}={facts[key]:g} must be positive"
        for key in (*UNITS, "chips", "chips_per_node")
        if not facts[key] > 0
    ]
    if not wrong and facts["chips"] > facts["chips_per_node"]:
        if facts["chips"] % facts["chips_per_node"]:
            per_node = facts["chips_per_node"]
            wrong.append(f"chips={facts['chips']} does not fill nodes of chips_per_node={per_node}")
        if facts["link_between_nodes"] > facts["link_within_node"]:
            wrong.append("link_between_nodes is faster than link_within_node; swap them")
    for key in ("link_within_node", "link_between_nodes"):
        if not wrong and facts[key] > facts["memory_bandwidth"]:
            wrong.append(f"{key} is faster than the chip's memory_bandwidth, which feeds it")
    if wrong:
        raise ConfigError(f"cluster {facts['name']}: " + "; ".join(wrong))
    return Cluster(**facts)
