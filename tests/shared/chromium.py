"""Shows a page in headless Chromium."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
QUIET = "--disable-quic --no-first-run --disable-background-networking --disable-component-update"


def colors(page: Path, folder: Path) -> dict[tuple[int, int, int], float]:
    """Returns the shares of all colours in a screenshot of 1000 x 3000 pixels."""
    from PIL import Image

    shot = folder / "shot.png"
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *QUIET.split(),
        "--disable-sync",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1000,3000",
        f"--screenshot={shot}",
        page.as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    image = Image.open(shot).convert("RGB")
    total = image.width * image.height
    return {c: n / total for n, c in image.getcolors(maxcolors=1 << 24) or []}
