"""`import glm_core.deepspeed.in_place` before all else: then every `import deepspeed` and `from
deepspeed.x import y` of the process finds glm_core.deepspeed, also those of other packages."""

from __future__ import annotations

import sys

import glm_core.deepspeed as ours
from glm_core.deepspeed.names import FINDER, MODULES, PACKAGE
from glm_core.errors import ConfigError

_there = sys.modules.get("deepspeed", ours)
if _there is not ours:
    raise ConfigError("in_place: deepspeed is imported already; import glm_core's before it")
FINDER.in_place = True
for _path in MODULES:  # some are modules below modules, which no finder is asked for
    sys.modules[f"deepspeed.{_path}"] = sys.modules[f"{PACKAGE}.{_path}"]
