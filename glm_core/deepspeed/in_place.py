"""Puts glm_core.deepspeed in DeepSpeed's place. After `import glm_core.deepspeed.in_place`, which
must come first, every `import deepspeed` and `from deepspeed.x import y` of the process finds
glm_core.deepspeed, in other packages too."""

from __future__ import annotations

import sys

import glm_core.deepspeed as ours
from glm_core.deepspeed.names import FINDER
from glm_core.errors import ConfigError

if sys.modules.get("deepspeed", ours) is not ours:
    raise ConfigError(
        "in_place: deepspeed is imported already; import glm_core.deepspeed.in_place first"
    )
FINDER.in_place = True
