"""The environments of other projects' packages, `.venv-NAME`, that `make NAME` builds on the torch
of `.venv`."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def lack(name: str, target: str = "", root: Path = ROOT) -> str:
    """Why `.venv-NAME` cannot be compared with here: it is not there, or it has another torch than
    the one that runs. Empty: it can. target: what makes it, by default `make NAME`."""
    folder = root / f".venv-{name}"
    if not (folder / "bin/python").exists():
        return f"no .venv-{name}; `make {target or name}` makes it"
    sites = [*folder.glob("lib/python3*/site-packages")]
    based_on = [line for site in sites for file in site.glob("*.pth") for line in lines(file)]
    [theirs, *_] = metadata.distributions(name="torch", path=[*map(str, sites), *based_on])
    ours = str(torch.__version__)
    if theirs.version.partition("+")[0] != ours.partition("+")[0]:
        return f".venv-{name} is for torch {theirs.version}; this is torch {ours}"
    return ""


def lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()
