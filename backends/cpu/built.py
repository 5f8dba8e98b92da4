"""Reads the note that setup.py leaves beside an extension, before the extension is loaded."""

from __future__ import annotations

import json
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from glm_core import versions


def trouble(folder: Path, build: str) -> str:
    """Returns why the extension in `folder` must not be loaded, or ''. `build` is the command that
    builds it. An extension built for another torch could end the process when it is loaded."""
    extension = folder / f"_C{EXTENSION_SUFFIXES[0]}"
    try:
        note = json.loads(extension.with_suffix(".json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        lack = "without a note of the torch it was built for" if extension.exists() else "not built"
        return f"{lack}; {build}"
    if not extension.exists():
        return f"not built: {note.get('trouble', 'it was removed')}; {build}"
    here = {"torch": torch.__version__, "cxx11_abi": torch.compiled_with_cxx11_abi()}
    if (_release(note), note["cxx11_abi"]) == (_release(here), here["cxx11_abi"]):
        return ""
    return f"built for torch {_words(note)}, running {_words(here)}; rebuild with: {build}"


def _release(facts: dict[str, Any]) -> str:
    return versions.release(str(facts["torch"]))


def _words(facts: dict[str, Any]) -> str:
    return f"{facts['torch']}{'' if facts['cxx11_abi'] else ' with the old C++ ABI'}"
