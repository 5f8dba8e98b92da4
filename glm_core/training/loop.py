"""The loop over the steps of a run: metrics, checkpoints, roll-backs and stop requests."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from glm_core.diagnose import device_errors, watchdog
from glm_core.errors import TrainingError
from glm_core.session import Fallback, Session
from glm_core.training.metrics import Progress
from glm_core.training.policy import RollBack
from glm_core.training.trainer import Trainer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a run ended."""

    steps: int
    """done in all, those before a resume included"""
    loss: float | None
    """of the last step; None where this call did none"""
    tokens_per_s: float
    """over the steps of this call after its first, batches included, checkpoints not; 0 where there
    are none"""
    interrupted: bool
    """stopped by SIGINT or SIGTERM before the last step"""
    fallbacks: dict[Fallback, int]
    """reference in a kernel's place: calls, or traces where compiled; each with its reason"""
    checkpoint: Path


def loop(
    trainer: Trainer,
    session: Session,
    stop_requested: Callable[[], bool],
    start: Path | None = None,
) -> Result:
    """Trains to the last step, or until `stop_requested` returns True before a step. start: the
    checkpoint this call began from. Raises TrainingError."""
    t, metrics, saved = trainer.config.train, trainer.metrics, start
    progress = Progress(t.steps)
    loss, tokens, seconds, first = None, 0, 0.0, True
    while trainer.steps_done < t.steps and not stop_requested():
        begin = time.perf_counter()
        watchdog.beat(f"step {trainer.steps_done + 1}")
        try:
            result = trainer.step()
        except RollBack as reason:
            _roll_back(trainer, start, reason)
            continue
        took, loss, saved = time.perf_counter() - begin, result.loss, None
        if not first:  # the first step also allocates and compiles
            tokens, seconds = tokens + result.tokens, seconds + took
        first = False
        if metrics is not None:
            metrics.write({**result.figures(), "step_ms": round(took * 1e3, 3)})
            speed = tokens / seconds if seconds else 0.0
            line = f"loss {loss:.4f}  lr {result.lr:.2e}  {speed:.0f} tokens/s"
            progress.update(result.step, line)
        if t.save_every and result.step % t.save_every == 0:
            saved = _save(trainer)
    return Result(
        steps=trainer.steps_done,
        loss=loss,
        tokens_per_s=tokens / seconds if seconds else 0.0,
        interrupted=trainer.steps_done < t.steps,
        fallbacks=dict(session.fallbacks + session.compiled),
        checkpoint=saved or _save(trainer),
    )


def _roll_back(trainer: Trainer, start: Path | None, reason: RollBack) -> None:
    """Goes back to the newest checkpoint. Raises TrainingError where there is none."""
    assert trainer.checkpoints is not None
    path = trainer.checkpoints.latest() or start
    if path is None:
        raise TrainingError(f"{reason}; there is no checkpoint to go back to") from None
    trainer.roll_back(trainer.checkpoints.open(path))
    if trainer.metrics is not None:
        trainer.metrics.rewind(trainer.steps_done)


def _save(trainer: Trainer) -> Path:
    if trainer.metrics is not None:
        trainer.metrics.sync()  # the checkpoint promises every line before it
    what = f"checkpoint of step {trainer.steps_done}"
    watchdog.beat(what)
    with device_errors.explained(trainer.backend.name, what):
        return trainer.save()
