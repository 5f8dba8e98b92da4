"""An environment of another project's package serves only the torch that it was built on."""

from __future__ import annotations

from pathlib import Path

import peer_environments
import torch


def test_why_an_environment_cannot_serve(tmp_path: Path) -> None:
    assert peer_environments.lack("sat", "peers", tmp_path) == (
        "no .venv-sat; `make peers` makes it"
    )
    site = tmp_path / ".venv-sat/lib/python3.11/site-packages"
    base = tmp_path / "base"
    for folder in (site, base, tmp_path / ".venv-sat/bin"):
        folder.mkdir(parents=True)
    (tmp_path / ".venv-sat/bin/python").touch()
    (site / "base.pth").write_text(f"{base}\n")
    set_torch(base, str(torch.__version__).partition("+")[0] + "+other")
    assert peer_environments.lack("sat", "peers", tmp_path) == ""
    set_torch(base, "1.0.0+cpu")
    assert peer_environments.lack("sat", "peers", tmp_path) == (
        f".venv-sat is for torch 1.0.0+cpu; this is torch {torch.__version__}"
    )


def set_torch(site: Path, version: str) -> None:
    info = site / "torch-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
