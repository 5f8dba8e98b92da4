"""Decides what a run does about a step that went wrong: it stops, leaves the update out, or goes
back to the last checkpoint and past the data in between. Imports no torch."""

from __future__ import annotations

import math
import statistics
import sys
from collections import deque
from typing import Any, Literal

from glm_core.config import PolicyConfig
from glm_core.errors import TrainingError


class RollBack(TrainingError):
    """Raised by a step that must not count; the message is the reason."""


class Policy:
    """Keeps the recent losses of one run and decides by them. Many ranks decide alike, for loss and
    gradient norm are the global ones."""

    def __init__(self, config: PolicyConfig, is_reporter: bool = True) -> None:
        """is_reporter: says on stderr what is done about a bad step."""
        self.config, self.is_reporter = config, is_reporter
        self.losses: deque[float] = deque(maxlen=config.spike_window)
        self.bad, self._bad_step = 0, 0

    def spike(self, loss: float) -> str:
        """Returns why this loss is a spike, "" where it is none."""
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
        """Notes that the update of this step was made."""
        if math.isfinite(loss):
            self.losses.append(loss)
        if step > self._bad_step:
            self.bad = 0

    def decide(self, step: int, kind: Literal["nonfinite", "spike"], reason: str) -> None:
        """Returns if the update is to be left out; else raises TrainingError or RollBack. Says on
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
        outcome = "update left out" if action == "skip" else "back to the last checkpoint"
        if self.is_reporter:
            print(f"policy.{kind}={action}: step {step}: {reason}: {outcome}", file=sys.stderr)
        if action == "rollback":
            raise RollBack(f"step {step}: {reason}")

    def state(self) -> dict[str, Any]:
        """Returns JSON-able values for `restore`."""
        return {"losses": list(self.losses)}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to the losses up to a checkpoint, but remembers the bad steps since."""
        self.losses.clear()
        self.losses.extend(state["losses"])
