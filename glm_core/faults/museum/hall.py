"""Lists all exhibits of the museum."""

from __future__ import annotations

from glm_core.faults.museum import attention  # noqa: F401  # imported for what it lists
from glm_core.faults.museum.exhibit import Exhibit
from glm_core.faults.museum.kernels import KERNELS
from glm_core.faults.museum.plans import MANY
from glm_core.faults.museum.training import TRAINING

ONE_PROCESS: list[Exhibit] = [*KERNELS, *TRAINING]
HALL: list[Exhibit] = [*ONE_PROCESS, *MANY]
