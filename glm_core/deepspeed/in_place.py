"""Puts glm_core.deepspeed in DeepSpeed's place. After `import glm_core.deepspeed.in_place`, which
must come first, every `import deepspeed` and `from deepspeed.x import y` of the process finds
glm_core.deepspeed, in other packages too. `python -m glm_core.deepspeed.in_place SCRIPT ...` runs a
script unchanged."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import glm_core.deepspeed as ours
from glm_core.deepspeed.names import FINDER
from glm_core.errors import ConfigError

if sys.modules.get("deepspeed", ours) is not ours:
    raise ConfigError(
        "in_place: deepspeed is imported already; import glm_core.deepspeed.in_place first"
    )
FINDER.in_place = True

if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m glm_core.deepspeed.in_place SCRIPT [ARGUMENT ...]")
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
