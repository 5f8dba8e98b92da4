"""Captures every operator below autograd and has it judged at once, so that no more than one call
is kept. A message from another rank is judged once the program has waited for it."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from glm_core.conformance.oracle import EagerMode
from glm_core.distributed import transfers
from glm_core.distributed.messages import MessagesError
from glm_core.distributed.transfers import Receive
from glm_core.errors import NoRoomError
from glm_core.verdict import collectives, graphs, oracle, references
from glm_core.verdict.docket import Docket
from glm_core.verdict.judge import judge_drawn
from glm_core.verdict.oracle import Call
from glm_core.verdict.places import Place, Places
from glm_core.verdict.record import Recorder
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
        self.waiting: list[tuple[Receive, Place]] = []
        """messages that are on their way, with the places that receive them"""

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
        if self.waiting:
            self._judge_arrived(func, args, kwargs)
        if func._schema.name in transfers.OPERATORS:
            return self._transfer(func, args, kwargs)
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

    def _transfer(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs an operator that sends or receives, and remembers what it is to receive."""
        receives: list[Receive] = []
        with oracle.alone():
            try:
                receives = transfers.begin(func, args, kwargs)
            except MessagesError as error:
                self.docket.leave_out(func._schema.name, str(error), 0.0)
        out = func(*args, **kwargs)
        transfers.begun(receives, out)
        place = self.places.here()
        self.waiting += [(receive, place) for receive in receives]
        return out

    def _judge_arrived(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Judges the messages that the program has waited for, before it computes with them."""
        used = oracle.computes(func)
        with oracle.alone():
            memory = {_storage(x) for x in tree_leaves((args, kwargs)) if _is_tensor(x)}
            for receive, place in self.waiting:
                if receive.has_arrived(used and _storage(receive.buffer) in memory):
                    self._judge_transfer(receive, place)
            self.waiting = [(r, p) for r, p in self.waiting if not r.judged]
            if func._schema.name == "_c10d_functional::wait_tensor":
                for receive, _ in self.waiting:
                    receive.work = receive.work or _storage(receive.buffer) in memory

    def _judge_transfer(self, receive: Receive, place: Place) -> None:
        receive.judged = True
        flops = float(receive.buffer.numel())
        try:
            judgement = collectives.judge_transfer(receive)
        except MessagesError as error:
            self.docket.leave_out(receive.name, str(error), flops)
        else:
            self.docket.devices.add(receive.buffer.device.type)
            self.docket.add(receive.name, place, self.step, judgement, flops)

    def end(self) -> None:
        """Judges the messages that arrived in the step and were not used in it."""
        with oracle.alone():
            for receive, place in self.waiting:
                if receive.has_arrived(used=False):
                    self._judge_transfer(receive, place)
                else:
                    reason = "the program did not wait for it in the captured step, or not use it"
                    self.docket.leave_out(receive.name, reason, float(receive.buffer.numel()))
        self.waiting.clear()

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
        owned = {_storage(t) for t in tree_leaves(given) if _is_tensor(t)}

        def copy(x: Any) -> Any:
            shares = _is_tensor(x) and _storage(x) in owned
            return x.detach().clone() if shares else x

        with oracle.alone():
            args, kwargs = tree_map(copy, args), tree_map(copy, kwargs)
    return Call(func, args, kwargs, device_type.partition(":")[0])


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _flops(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> float:
    """Returns the FLOPs of a call as torch counts them, one per element of the results where torch
    has no count."""
    count = flop_registry.get(func.overloadpacket)
    if count is not None:
        return float(count(*args, **kwargs, out_val=out))
    values = out if out is not None else args
    return float(sum(t.numel() for t in tree_leaves(values) if isinstance(t, Tensor)))
