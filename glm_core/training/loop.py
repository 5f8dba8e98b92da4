"""What follows from a step's loss and gradients, and the loop over the steps of a run: the same on
one process and on many."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from glm_core.config import RunConfig, to_dict
from glm_core.diagnose import device_errors, watchdog
from glm_core.errors import DeviceError, TrainingError
from glm_core.session import Fallback, Session
from glm_core.training.loss_scale import initial_loss_scale
from glm_core.training.metrics import Metrics, Progress
from glm_core.training.optimizer import Optimizer, learning_rate
from glm_core.training.policy import Policy, RollBack


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step tells; goes into the metrics and the trace."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    global_batch: int
    loss_scale: float
    skipped: bool


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


class Updates:
    """Optimizer, loss scale and policy of a run, and how far it is. On many processes each has the
    same, because loss and gradient norm are the global ones: all decide alike."""

    def __init__(self, config: RunConfig, optimizer: Optimizer, tells: bool = True) -> None:
        """tells: says on stderr what the policy does."""
        self.config, self.optimizer = config, optimizer
        self.loss_scale = initial_loss_scale(config.train)
        self.policy = Policy(config.policy, tells)
        self.samples_seen = 0
        self.steps_done = 0

    def update(
        self, loss: float, sequences: int, tokens: int, explain: Callable[[str], str]
    ) -> StepResult:
        """One optimizer step from the parameters' `.grad`. A float16 overflow skips the update and
        lowers the loss scale; any other loss or gradient that is not finite, and a spike, is the
        policy's: TrainingError, RollBack or a skipped update, weights untouched. explain: makes of
        `the loss is nan` the whole reason."""
        step, t = self.steps_done + 1, self.config.train
        scale, lr = self.loss_scale.scale, learning_rate(t, step)
        spike = self.policy.spike(loss)
        bad = spike or not math.isfinite(loss)
        norm = math.nan if bad else float(self.optimizer.step(lr, scale))
        skipped = not math.isfinite(norm)
        if spike:
            self.policy.decide(step, "spike", spike)
        elif self._unexplained(skipped):
            what = f"gradient norm is {norm}" if math.isfinite(loss) else f"loss is {loss}"
            self.policy.decide(step, "nonfinite", explain(f"the {what}"))
        self.steps_done = step
        if not skipped:
            self.policy.good(step, loss)
        self.samples_seen += sequences
        return StepResult(step, loss, norm, lr, tokens, sequences, scale, skipped)

    def _unexplained(self, skipped: bool) -> bool:
        """Adapts the loss scale of a float16 run; whether the step was skipped for a reason that no
        lower scale can remedy."""
        if self.config.train.dtype != "float16":
            return skipped
        if skipped and self.loss_scale.scale <= self.loss_scale.minimum:
            return True
        self.loss_scale.update(skipped)
        return False

    def facts(self) -> dict[str, Any]:
        """JSON-able: with the optimizer's tensors what `restore_facts` goes on from."""
        return {
            "config": to_dict(self.config),
            "step": self.steps_done,
            "samples_seen": self.samples_seen,
            "optimizer_steps": self.optimizer.step_count,
            "loss_scale": self.loss_scale.state(),
            "policy": self.policy.state(),
        }

    def restore_facts(self, facts: dict[str, Any], tensors: dict[str, Any]) -> None:
        """Goes on where `facts` were taken; tensors: the optimizer's."""
        self.optimizer.restore({"tensors": tensors, "step_count": facts["optimizer_steps"]})
        self.loss_scale.restore(facts["loss_scale"])
        self.policy.restore(facts.get("policy", self.policy.state()))  # older ones have none
        self.steps_done = facts["step"]
        self.samples_seen = facts.get("samples_seen", 0)


class Steps(Protocol):
    """A run that `loop` advances."""

    @property
    def config(self) -> RunConfig: ...
    @property
    def steps_done(self) -> int: ...
    def step(self) -> StepResult: ...
    def roll_back(self, path: Path) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Saves:
    """Where a run's checkpoints go."""

    save: Callable[[], Path]
    """makes one of now, or begins to, and returns where it is"""
    latest: Callable[[], Path | None]
    """the newest whole one"""
    start: Path | None
    """that this call began from"""


def loop(
    run: Steps, saves: Saves, metrics: Metrics | None, session: Session, asked: Callable[[], bool]
) -> Result:
    """To the last step, or to the one in which `asked` says stop. metrics: None where another
    process tells."""
    t, saved, told = run.config.train, saves.start, Progress(run.config.train.steps)
    loss, tokens, seconds, timed = None, 0, 0.0, False
    while run.steps_done < t.steps and not asked():
        begin = time.perf_counter()
        watchdog.beat(f"step {run.steps_done + 1}")
        try:
            result = run.step()
        except RollBack as reason:
            if (path := saves.latest() or saves.start) is None:
                raise TrainingError(f"{reason}; there is no checkpoint to go back to") from None
            run.roll_back(path)
            if metrics is not None:
                metrics.rewind(run.steps_done)
            continue
        took, loss, saved = time.perf_counter() - begin, result.loss, None
        if timed:
            tokens, seconds = tokens + result.tokens, seconds + took
        timed = True  # the first step also allocates and compiles
        if metrics is not None:
            metrics.write({**dataclasses.asdict(result), "step_ms": round(took * 1e3, 3)})
            speed = tokens / seconds if seconds else 0.0
            told.update(result.step, f"loss {loss:.4f}  lr {result.lr:.2e}  {speed:.0f} tokens/s")
        if t.save_every and result.step % t.save_every == 0:
            saved = _save(run, saves, metrics, session)
    return Result(
        steps=run.steps_done,
        loss=loss,
        tokens_per_s=tokens / seconds if seconds else 0.0,
        interrupted=run.steps_done < t.steps,
        fallbacks=dict(session.fallbacks + session.compiled),
        checkpoint=saved or _save(run, saves, metrics, session),
    )


def _save(run: Steps, saves: Saves, metrics: Metrics | None, session: Session) -> Path:
    if metrics is not None:
        metrics.sync()  # the checkpoint promises every line before it
    what = f"checkpoint of step {run.steps_done}"
    watchdog.beat(what)
    with device_errors.explained(session.backend.name, what):
        return saves.save()


@contextmanager
def way_out(out: Path, latest: Callable[[], Path | None]) -> Iterator[None]:
    """To a device's error in the block the last checkpoint is added, to the disk's what to do."""
    try:
        yield
    except DeviceError as error:
        last = f"last checkpoint: {latest() or 'none'}"
        raise DeviceError(f"{error}; {last}", **error.place) from error.__cause__
    except OSError as error:
        told = f"{out}: {error}; make it writable or make room, then resume"
        raise TrainingError(told) from error
