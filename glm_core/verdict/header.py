"""Adds plain text to the header of a safetensors file. The command's own process does this, which
loads no torch."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path


def add(path: Path, name: str, text: str) -> None:
    """Adds an entry to the file's metadata."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with path.open("rb") as old, part.open("wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        header["__metadata__"][name] = text
        content = json.dumps(header).encode()
        content += b" " * (-len(content) % 8)
        new.write(len(content).to_bytes(8, "little") + content)
        shutil.copyfileobj(old, new)
    os.replace(part, path)
