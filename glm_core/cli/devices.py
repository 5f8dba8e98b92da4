"""`glm-core devices`: lists every backend, whether it is usable here, and how far it was
verified."""

from __future__ import annotations

import argparse
from typing import Any

from glm_core.cli.options import add_json, columns, emit


def define(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Probes every backend and exits 0, since an absent backend is no failure. An accelerator of
    torch's that no backend is for, such as Apple's mps, is listed as `reference:DEVICE`. Below the
    table stands what the running torch is too old for."""
    import torch

    from glm_core import versions
    from glm_core.backends import registry

    rows = [_row(name) for name in registry.names()]
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type not in {r["device"] for r in rows}:
        rows.append(_row(f"reference:{accelerator.type}"))
    table = [["backend", "device", "usable", "kernels", "verified", "reason"]]
    for r in rows:
        usable = "yes" if r["usable"] else "no"
        table.append(
            [
                str(x)
                for x in (r["name"], r["device"], usable, r["kernels"], r["verified"], r["reason"])
            ]
        )
    notes = versions.notes()
    emit(args, {"devices": rows, "notes": notes}, "\n".join([columns(table), *notes]))
    return 0


def _row(name: str) -> dict[str, Any]:
    from glm_core.backends import registry
    from glm_core.errors import GlmCoreError

    state = registry.probe(name)
    row = {"name": name, "usable": state.ok, "reason": state.reason}
    try:
        backend = registry.get(name)
        facts = {"device": backend.device_type, "verified": backend.verified}
        facts |= {"kernels": str(len(backend.kernels)), "collective": backend.collective}
    except GlmCoreError:
        facts = {"device": "", "verified": "", "kernels": "0", "collective": ""}
    return row | facts
