"""Finds where numbers stopped being finite, by watching every op call, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from glm_core import dispatch
from glm_core.dispatch import Op


class Watch:
    """Records the first op and the first gradient that are not finite; both are empty while all
    are."""

    def __init__(self) -> None:
        self.op = ""
        """where it happened, as `op geglu in blocks.2.mlp, forward, micro-batch 1`"""
        self.parameter = ""
        """the first parameter, in the order of the backward pass, whose gradient is not finite"""
        self._modules = ["the model"]
        self._micro_batch = 0

    def call(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the op and checks its outputs now, and the gradients of its inputs later."""
        place = f"op {op.name} in {self._modules[-1]}"
        positional = [
            self._input(value, f"{place}, backward (gradient of {name})")
            for name, value in zip(op.parameters, args, strict=False)
        ]
        named = {
            name: self._input(value, f"{place}, backward (gradient of {name})")
            for name, value in kwargs.items()
        }
        outputs = dispatch.run(op, tuple(positional), named)
        if not self.op and not finite(outputs):
            inputs = op.named(args, kwargs)
            bad = [name for name, value in inputs.items() if not finite(value)]
            cause = f" (its {', '.join(bad)} is not finite either)" if bad else ""
            when = f", forward, micro-batch {self._micro_batch}" if torch.is_grad_enabled() else ""
            self.op = f"{place}{when}{cause}"
        return outputs

    def _input(self, value: Any, where: str) -> Any:
        """Returns an alias of an input. The alias's gradient is what this one call contributes,
        before any summation."""
        if not (isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()):
            return value
        alias = value.view_as(value)
        batch = self._micro_batch

        def look(gradient: Tensor) -> None:
            if not self.op and not finite(gradient):
                self.op = f"{where}, micro-batch {batch}"

        alias.register_hook(look)
        return alias

    def enter(self, name: str) -> None:
        """Notes that a module's forward begins; the root module's begins a micro-batch."""
        self._micro_batch += not name
        self._modules.append(name or "the model")

    def leave(self) -> None:
        """Notes that a module's forward has ended."""
        self._modules.pop()

    def gradient(self, name: str, parameter: Tensor) -> None:
        """Checks a parameter's gradient, complete for this micro-batch."""
        if not self.parameter and not finite(parameter.grad):
            self.parameter = name


def finite(value: Any) -> bool:
    """Returns whether a tensor, or every tensor in a tuple or list, is finite; anything else is."""
    if isinstance(value, tuple | list):
        return all(map(finite, value))
    if not isinstance(value, Tensor):
        return True
    local = value.to_local() if hasattr(value, "to_local") else value  # of a DTensor, no collective
    return bool(torch.isfinite(local).all())


@contextmanager
def watch(model: nn.Module) -> Iterator[Watch]:
    """Watches every op call of this thread in the block, and the backward passes that follow."""
    first = Watch()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            before = module.register_forward_pre_hook(lambda m, a, name=name: first.enter(name))
            after = module.register_forward_hook(lambda m, a, out: first.leave())
            stack.callback(before.remove)
            stack.callback(after.remove)
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            hook = p.register_post_accumulate_grad_hook(
                lambda p, name=name: first.gradient(name, p)
            )
            stack.callback(hook.remove)
        stack.enter_context(dispatch.intercept(first.call))
        yield first


def message(subject: str, op: str, parameter: str) -> str:
    """Returns the whole message: `subject` (`the loss is nan`), what a watch has found, the way
    out."""
    fallback = "summing gradients" if parameter else "op global_norm"
    return (
        f"{subject}; first not finite: {op or fallback}; "
        f"first parameter with such a gradient: {parameter or 'none'}; resume from the last "
        "checkpoint with a lower train.lr, or look into that op"
    )
