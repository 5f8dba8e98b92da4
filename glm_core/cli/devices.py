"""`glm-core devices`: lists every backend, whether it is usable here, and how far it was
verified."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from typing import Any

from glm_core.cli.options import add_json, columns, emit


def define(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Probes every backend and exits 0, since an absent backend is no failure. An accelerator of
    torch's that no backend is for, such as Apple's mps, is listed as `reference:DEVICE`. Below the
    table stand the reasons, how far each backend was verified, and what the running torch is too
    old for."""
    import torch

    from glm_core import versions
    from glm_core.backends import registry

    rows = [_row(name) for name in registry.names()]
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type not in {r["device"] for r in rows}:
        rows.append(_row(f"reference:{accelerator.type}"))
    table = [["backend", "device", "usable", "kernels"]]
    table += [[r["name"], r["device"], "yes" if r["usable"] else "no", r["kernels"]] for r in rows]
    details = [
        _wrapped(f"{r['name']}: {label}{text}")
        for r in rows
        for label, text in (("not usable: ", r["reason"]), ("verified: ", r["verified"]))
        if text
    ]
    notes = versions.notes()
    text = "\n".join([columns(table), "", *details, *notes])
    emit(args, {"devices": rows, "notes": notes}, text)
    return 0


def _wrapped(line: str) -> str:
    """Returns a sentence in lines that fit the terminal, all but the first indented."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    return textwrap.fill(line, width, subsequent_indent="  ") if width > 20 else line


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
