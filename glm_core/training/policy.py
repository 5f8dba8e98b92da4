"""What a run does about a step that went wrong: stop, leave the update out, or go back to the last
checkpoint and past the data in between. Imports no torch."""

from __future__ import annotations

import math
import statistics
import sys
from collections import deque
from typing import Any, Literal

from glm_core.config import PolicyConfig
from glm_core.errors import TrainingError


class RollBack(TrainingError):
    """The step that raised it must not count; the message is the reason."""


class Policy:
    """The recent losses of one run and what follows from them. On many ranks every one decides
    alike, for loss and gradient norm are the global ones."""

    def __init__(self, config: PolicyConfig, tells: bool = True) -> None:
        self.config, self.tells = config, tells
        self.losses: deque[float] = deque(maxlen=config.spike_window)
        self.bad, self._bad_step = 0, 0

    def spike(self, loss: float) -> str:
        """Why this loss is one, "" where it is not."""
        seen = len(self.losses)
        if self.config.spike == "off" or 2 * seen < self.config.spike_window:
            return ""
        mean, sigma = statistics.fmean(self.losses), statistics.pstdev(self.losses)
        if not loss > mean + self.config.spike_sigma * sigma:  # not: NaN is another matter
            return ""
        return (
            f"loss {loss:.4f} is a spike: more than {self.config.spike_sigma:g} x {sigma:.4f} "
            f"above {mean:.4f}, the mean of the last {seen} steps"
        )

    def good(self, step: int, loss: float) -> None:
        """The update of this step was made."""
        if math.isfinite(loss):
            self.losses.append(loss)
        if step > self._bad_step:
            self.bad = 0

    def decide(self, step: int, kind: Literal["nonfinite", "spike"], reason: str) -> None:
        """Returns where the update is to be left out; raises TrainingError or RollBack. Says on
        stderr what was done and why."""
        action: str = getattr(self.config, kind)
        self.bad, self._bad_step = self.bad + 1, max(step, self._bad_step)
        if action != "stop" and self.bad > self.config.limit:
            raise TrainingError(
                f"step {step}: {reason}; {self.bad} bad steps without a good one beyond them, "
                f"policy.limit={self.config.limit}: resume with a lower train.lr"
            )
        if action == "stop":
            raise TrainingError(f"step {step}: {reason}")
        told = "update left out" if action == "skip" else "back to the last checkpoint"
        if self.tells:
            print(f"policy.{kind}={action}: step {step}: {reason}: {told}", file=sys.stderr)
        if action == "rollback":
            raise RollBack(f"step {step}: {reason}")

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"losses": list(self.losses)}

    def restore(self, state: dict[str, Any]) -> None:
        """The losses up to a checkpoint; how many bad steps there were since is not forgotten."""
        self.losses.clear()
        self.losses.extend(state["losses"])
