"""The rooms of the product, lowest first, and every module in them."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]

CHAIN = (
    "errors",
    "versions",
    "environment",
    "config",
    "choice",
    "spec",
    "decode_step",
    "session",
    "dispatch",
    "ops",
    "backends",
    "measure",
    "diagnose",
    "data",
    "model",
    "training",
    "export",
    "distributed",
    "pretrained",
    "faults",
    "conformance",
    "align",
    "sensitivity",
    "rollout",
    "verdict",
    "planner",
    "serve",
    "deepspeed",
    "bench",
    "doctor",
    "cli",
)
"""the rooms, lowest first: a module imports from its own room and from those before it, so there is
no cycle between rooms"""


def modules() -> dict[str, Path]:
    """Every module of the package by its name below glm_core."""
    found = {}
    for folder, prefix in (("glm_core", ""), ("backends", "backends."), ("bench", "bench.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "glm_core" and parts[0] in ("backends", "bench"):
                continue  # symlinks to the root's folders
            found[(prefix + ".".join(parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()
