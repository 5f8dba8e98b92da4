"""Decides how scripts hear of what has no effect here: one line on stderr, once per process."""

from __future__ import annotations

import sys

_shown: set[str] = set()


def say_once(text: str) -> None:
    """Prints a line on stderr the first time it is asked to."""
    if text not in _shown:
        _shown.add(text)
        print(f"glm_core.deepspeed: {text}", file=sys.stderr)
