"""Says what an exhibit of the museum is: a mistake that a public report describes, how it is
planted here, and what a verdict must name."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

from glm_core.config import Dtype

Part = Literal["kernel", "training", "resume", "plan"]
"""where it is planted: in an op's kernel, in a trainer on one process, in how a run is resumed, or
in the work of many processes"""
Shown = Literal["loss", "norm", "both", "neither", "not said"]
"""what showed it, by the report: the loss, the gradient norm, both or neither of them"""
Plant = Callable[[], AbstractContextManager[Any]]
"""makes a context in which the mistake is made"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Exhibit:
    """A mistake that somebody shipped, or nearly."""

    name: str
    part: Part
    report: str
    """URL of the public report"""
    did: str
    """what it did, by the report"""
    shown: Shown = "not said"
    where: str
    """pattern of what must be named: `attention forward`, `gradient of embedding`, `update`"""
    fault: str = ""
    """of a kernel: its name or id in the catalogue"""
    plant: Plant | None = None
    """of anything else: the mistake"""
    dtype: Dtype = "float32"
    """working dtype of the run, or of the kernel's cases, that must find it"""
    plan: str = ""
    """of many processes: their plan"""

    @property
    def project(self) -> str:
        """The project that the report is about."""
        return "/".join(self.report.split("/")[3:5])

    @property
    def held_out(self) -> bool:
        """Whether it belongs to the quarter, chosen by a hash of the name, that is judged only
        once."""
        return hashlib.sha256(self.name.encode()).digest()[0] % 4 == 0


GITHUB = "https://github.com/"
