"""Says what a training run of a job is."""

from __future__ import annotations

import dataclasses

from glm_core.config import Dtype
from glm_core.distributed.plan import parse


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One training run of a job."""

    plan: str
    model: str = "130b"
    dtype: Dtype = "float32"
    bug: str = ""

    @property
    def world(self) -> int:
        """The number of processes of its job."""
        return parse(self.plan).world

    def __str__(self) -> str:
        return "-".join(filter(None, (self.bug, self.model, self.dtype, self.plan)))
