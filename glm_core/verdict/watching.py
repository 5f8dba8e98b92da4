"""Watches a training program: captures every ATen operator of chosen optimizer steps, below
autograd, and has it judged at once, so that no more than one call is kept."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from glm_core.align.verdict import FALSE_ALARM_RATE
from glm_core.conformance.oracle import EagerMode
from glm_core.distributed.messages import MessagesError, rank_in_words, wait_for_readers
from glm_core.distributed.reports import num_ranks
from glm_core.errors import ConfigError, NoRoomError, TrainingError
from glm_core.measure import memory
from glm_core.verdict import boundary, collectives, graphs, oracle, references
from glm_core.verdict.docket import Docket
from glm_core.verdict.judge import judge_drawn
from glm_core.verdict.oracle import Call
from glm_core.verdict.places import Places, source_line
from glm_core.verdict.record import Recorder
from glm_core.verdict.report import Report
from glm_core.verdict.room import judge_in_room, out_of_memory
from glm_core.verdict.slices import too_large

MAX_ELEMENTS = 1 << 26
"""a call with more elements in one tensor, of which no rows can be judged alone, is left out: its
float64 copies would not fit"""


COLLECTIVES = ("c10d", "_c10d_functional")
"""namespaces of the operators that pass tensors between ranks"""
DRAWN = torch.ops.aten.bernoulli_.float
"""draws dropout's mask; its results have a distribution to be judged by"""


class Capture(EagerMode):
    """The mode that is active during captured steps."""

    def __init__(self, docket: Docket, places: Places) -> None:
        super().__init__()
        self.docket, self.places = docket, places
        self.step = 0
        self.process = os.getpid()
        self.recorder: Recorder | None = None
        self.num_short = 0
        """calls of which smaller parts than usual were judged"""
        self.unit = 0.0
        """the unit in the last place of the coarsest dtype that the program multiplies in"""

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if os.getpid() != self.process:  # a worker of a data loader
            return func(*args, **kwargs)
        if any(t.__torch_dispatch__ is not Tensor.__torch_dispatch__ for t in types):
            return NotImplemented  # the subclass is asked first; what it calls comes here
        if not isinstance(func, torch._ops.OpOverload):
            self.docket.leave_out(str(func), "higher-order operator; no reference", 0.0)
            return func(*args, **kwargs)
        if func.namespace in COLLECTIVES and func._schema.name not in references.NO_VALUES:
            return self._collective(func, args, kwargs)
        if not oracle.computes(func):
            return func(*args, **kwargs)
        drawn = func is DRAWN and len(args) > 1
        reason = ("" if drawn else references.why_not(func)) or _unfit(args, kwargs)
        try:
            call = None if reason else _kept(func, args, kwargs)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            call, reason = None, "no memory on its device for a copy of what it writes"
        out = func(*args, **kwargs)
        with oracle.alone():
            flops = _flops(func, args, kwargs, out)
            if call is None:
                self.docket.leave_out(func._schema.name, reason, flops)
            else:
                self._judge(call, oracle.results(func, args, kwargs, out), flops)
        return out

    def _collective(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs a collective and judges it by what the ranks sent."""
        name = func._schema.name
        with oracle.alone():
            shown = collectives.begin(func, args, kwargs)
        out = func(*args, **kwargs)
        with oracle.alone():
            flops = _flops(func, args, kwargs, out)
            try:
                if isinstance(shown, str):
                    raise MessagesError(shown)
                judgement = collectives.judge_collective(shown, out, self.docket.least_z)
            except MessagesError as error:
                self.docket.leave_out(name, str(error), flops)
            else:
                self.docket.devices.add(shown.device_type)
                self.docket.add(name, self.places.here(), self.step, judgement, flops)
        return out

    def _judge(self, call: Call, actual: oracle.Results, flops: float) -> None:
        name = call.func._schema.name
        place = self.places.here()
        self.docket.devices.add(call.device_type)
        if call.func.overloadpacket in flop_registry:
            dtypes = [y.dtype for y in actual.values() if y.is_floating_point()]
            self.unit = max([self.unit, *(torch.finfo(d).eps for d in dtypes)])
        if too_large(call, MAX_ELEMENTS):
            reason = f"a tensor of more than {MAX_ELEMENTS} elements, and no rows of their own"
            self.docket.leave_out(name, reason, flops)
            return
        try:
            if call.func is DRAWN:
                judgement = judge_drawn(float(call.args[1]), actual["self"])
            else:
                seed, z = self.docket.num_tests, self.docket.least_z
                judgement, smaller = judge_in_room(call, actual, seed, z)
                self.num_short += smaller
        except NoRoomError as error:
            self.docket.leave_out(name, str(error), flops)
            return
        except Exception as error:  # the host has no kernel for it
            text = str(error).strip().splitlines() or [type(error).__name__]
            reason = f"the host cannot compute it in float64: {text[0]:.100}"
            self.docket.leave_out(name, reason, flops)
            return
        self.docket.add(name, place, self.step, judgement, flops)
        if self.recorder is not None and call.func is not DRAWN:
            self.recorder.add(call, actual, place, self.step, wrong=bool(judgement.outside))


def _unfit(args: Any, kwargs: dict[str, Any]) -> str:
    """Returns why these arguments cannot be judged, "" where they can."""
    for x in tree_leaves((args, kwargs)):
        if not isinstance(x, Tensor):
            continue
        if x.is_meta or x.layout != torch.strided or x.is_quantized:
            return "its tensors have no values, are sparse or quantized"
        if x.device.type != "cpu" and graphs.captured(x.device.type):
            return "it is captured into a graph and has no values yet"
    return ""


def _kept(func: Any, args: Any, kwargs: dict[str, Any]) -> Call:
    """Returns the call with copies of what the operator writes, and of what shares memory with
    it."""
    names = oracle.written(func)
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    device_type = leaves[0].device.type if leaves else str(kwargs.get("device") or "cpu")
    if names:
        given = [oracle.argument(func, args, kwargs, n) for n in names]
        owned = {t.untyped_storage().data_ptr() for t in tree_leaves(given) if _is_tensor(t)}

        def copy(x: Any) -> Any:
            shares = _is_tensor(x) and x.untyped_storage().data_ptr() in owned
            return x.detach().clone() if shares else x

        with oracle.alone():
            args, kwargs = tree_map(copy, args), tree_map(copy, kwargs)
    return Call(func, args, kwargs, device_type.partition(":")[0])


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _flops(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> float:
    """Returns the FLOPs of a call as torch counts them, one per element of the results where torch
    has no count."""
    count = flop_registry.get(func.overloadpacket)
    if count is not None:
        return float(count(*args, **kwargs, out_val=out))
    values = out if out is not None else args
    return float(sum(t.numel() for t in tree_leaves(values) if isinstance(t, Tensor)))


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
        self.captured: list[int] = []
        self.seconds = 0.0
        self.notes: list[str] = []
        self._begin: float | None = None
        self._active = ExitStack()
        self._compiled = 0
        self._kept: list[boundary.Kept] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> watch:
        self._hooks = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]
        self._start_or_not()
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._stop()

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
        wait_for_readers()
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
        rate = self.docket.rate / num_ranks()
        findings = self.docket.findings(rate)
        return Report(
            program=", ".join(filter(None, (self.program, rank_in_words()))),
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
