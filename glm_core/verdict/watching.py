"""Watches a training program: chosen optimizer steps are captured, the others run as they are."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from glm_core.align.verdict import FALSE_ALARM_RATE
from glm_core.distributed import transfers
from glm_core.distributed.messages import unseen_groups, wait_for_readers
from glm_core.distributed.reports import Job, job
from glm_core.errors import ConfigError, TrainingError
from glm_core.measure import memory
from glm_core.verdict import boundary, graphs
from glm_core.verdict.capture import Capture
from glm_core.verdict.docket import Docket
from glm_core.verdict.places import Places, source_line
from glm_core.verdict.report import Report


def _num_compiled() -> int:
    """Returns how many frames torch.compile has looked at so far."""
    module = sys.modules.get("torch._dynamo.utils")
    return int(module.counters["frames"]["total"]) if module is not None else 0


class watch:
    """Watches the steps of an optimizer inside a `with` block. Captured steps are slow, the others
    run as they are. `report` gives the verdict after the block.

    model: gives the modules' names; the default is the outermost module that runs. optimizer: whose
    steps count; the default is the first one that makes a step. steps: the numbers of the captured
    steps, from 1; step 1 begins with the block."""

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        steps: Sequence[int] = (2,),
        *,
        false_alarm_rate: float = FALSE_ALARM_RATE,
        program: str = "",
    ) -> None:
        if not steps or min(steps) < 1:
            raise ConfigError(f"verdict: steps={list(steps)}; pass numbers from 1, such as 2,5")
        self.steps = sorted(set(steps))
        self.optimizer = optimizer
        self.program = program or (type(model).__name__ if model is not None else "program")
        self.docket, self.places = Docket(false_alarm_rate), Places(model)
        self.mode = Capture(self.docket, self.places)
        self.done = 0
        """optimizer steps so far"""
        self.job: Job | None = None
        self.captured: list[int] = []
        self.seconds = 0.0
        self.notes: list[str] = []
        self._begin: float | None = None
        self._active, self._whole = ExitStack(), ExitStack()
        self._compiled = 0
        self._kept: list[boundary.Kept] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> watch:
        self._hooks = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]
        self._whole.enter_context(transfers.counted())
        self._start_or_not()
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._stop()
        self._whole.close()

    def _start_or_not(self) -> None:
        self.mode.step = self.done + 1
        if self.mode.step in self.steps:
            self._begin = time.perf_counter()
            self.captured.append(self.mode.step)
            self.places.start()
            self._compiled = _num_compiled()
            if "torch._dynamo" in sys.modules:  # else nothing is compiled, and it loads for seconds
                self._active.enter_context(torch.compiler.set_stance("force_eager"))
            self._active.enter_context(graphs.replays(self._note_replay))
            self._kept = self._active.enter_context(boundary.kept_calls(source_line))
            self._active.enter_context(self.mode)

    def _stop(self) -> None:
        if self._begin is None:
            return
        self._active.close()
        self.mode.end()
        wait_for_readers()
        for name in unseen_groups():
            self._note(
                f"the process group {name} is written in Python: what it passes between ranks is "
                "not seen, and not judged"
            )
        self.places.stop()
        self._note_compiled()
        for kept in self._kept:
            boundary.enter(kept, self.docket, self.places, self.mode.step)
        self._kept = []
        if self.mode.num_short:
            self._note("memory was short: of some calls, smaller parts than usual were judged")
        self.seconds += time.perf_counter() - self._begin
        self._begin = None

    def _note_replay(self) -> None:
        self._note(
            f"a CUDA graph was replayed in step {self.mode.step}: what runs inside was not judged, "
            "only what its results are given to; judge a run without graphs"
        )

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _note_compiled(self) -> None:
        if _num_compiled() > self._compiled:
            self._note(
                f"functions were compiled in step {self.mode.step}: what ran inside them was not "
                "judged; judge a later step"
            )
        elif self._compiled:
            self._note(
                "compiled functions ran without the compiler in the captured steps; modules that "
                "torch.compile returned were judged by their outputs and gradients, other compiled "
                "functions are by the loss: --curve 20 --with glm_core.verdict:eager"
            )

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.optimizer = self.optimizer if self.optimizer is not None else optimizer
        self.places.optimizer = optimizer
        self.job = self.job or job()

    def _share_of(self, rate: float) -> float:
        """Returns this rank's share of a job's false-alarm rate."""
        return rate / (self.job.world if self.job else 1)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.places.optimizer = None
        if optimizer is not self.optimizer:
            return
        self._stop()
        self.done += 1
        self._start_or_not()

    def report(self, context: str = "") -> Report:
        """Returns the verdict on the captured steps. Raises TrainingError where none was
        reached."""
        if not self.docket.calls and not self.docket.unjudged:
            steps = ", ".join(map(str, self.steps))
            raise TrainingError(
                f"verdict: {self.program} made {self.done} optimizer steps, none of {steps} was "
                "captured; pass smaller numbers with --steps, or let the program run longer"
            )
        self.job = self.job or job()
        rate = self._share_of(self.docket.rate)
        rank = self.job.in_words() if self.job else ""
        findings = self.docket.findings(rate)
        return Report(
            program=", ".join(filter(None, (self.program, rank))),
            devices=sorted(self.docket.devices),
            steps=self.captured,
            findings=findings,
            operators=self.docket.rows(findings),
            not_judged=self.docket.not_judged(),
            num_tests=self.docket.num_tests,
            false_alarm_rate=rate,
            seconds=self.seconds,
            peak_memory_bytes=memory.resident_peak_bytes(),
            context=context,
            torch=torch.__version__,
            notes=self.notes,
        )
