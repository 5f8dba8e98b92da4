"""Names where an operator ran: the module's path, the line of the source and the phase. An operator
of the backward pass has the place of the forward operator that it differentiates."""

from __future__ import annotations

import dataclasses
import os
import sys
import weakref
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import Optimizer

_OWN = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)
"""files in these folders are not the program's"""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where an operator ran."""

    module: str
    """path in the outermost module; the class of that one itself, "" outside of modules"""
    line: str
    """FILE:LINE of the innermost frame that is not torch's"""
    phase: str
    """forward, backward or optimizer"""


class Places:
    """Follows the program through its modules while it is active."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self.stack: list[str] = []
        self.forward: dict[int, Place] = {}
        """by the number of the autograd node: the place of the operator that made it"""
        self.optimizer: Optimizer | None = None
        """the one whose step runs now"""
        self._hooks: list[Any] = []
        if model is not None:
            self._name(model)

    def start(self) -> None:
        """Begins to follow the modules."""
        self._hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def stop(self) -> None:
        """Ends what `start` began."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.stack.clear()
        self.forward.clear()

    def _name(self, root: nn.Module) -> None:
        for name, module in root.named_modules():
            self.names.setdefault(module, name or type(root).__name__)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module not in self.names:
            self._name(module)
        self.stack.append(self.names[module])

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.stack:
            self.stack.pop()

    def here(self) -> Place:
        """Returns the place of the operator that is running now."""
        node: Any = torch._C._current_autograd_node()
        if node is not None:
            place = self.forward.get(node._sequence_nr())
            if place is not None:
                return dataclasses.replace(place, phase="backward")
            return Place("", source_line(), "backward")
        if self.optimizer is not None:
            return Place(type(self.optimizer).__name__, source_line(), "optimizer")
        place = Place(self.stack[-1] if self.stack else "", source_line(), "forward")
        # autograd made the operator's node already, if it makes one at all
        self.forward.setdefault(torch._C._autograd._get_sequence_nr() - 1, place)
        return place


def source_line() -> str:
    """Returns FILE:LINE of the innermost frame that is neither torch's nor the verdict's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_OWN) and not name.startswith("<"):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown:0"
