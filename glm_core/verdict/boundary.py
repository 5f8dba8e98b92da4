"""Judges a compiled module at the boundary of its graph: its outputs and gradients against the
module without the compiler in float64. The operators inside a graph are not seen."""

from __future__ import annotations

import copy
import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from glm_core.align.disguise import Exact, Regrouped, Rounded
from glm_core.align.replay import LOW
from glm_core.verdict.docket import Docket
from glm_core.verdict.judge import Judgement, judge_sizes
from glm_core.verdict.oracle import Results, moved
from glm_core.verdict.places import Place, Places

SEED = 20
"""of the random direction that gradients are taken in"""
MAX_WEIGHTS = 1 << 27
"""a module with more weights is left out: its float64 copies would not fit"""


@dataclasses.dataclass(slots=True, eq=False)
class Kept:
    """A call of a compiled module, with copies of its arguments."""

    compiled: Callable[..., Any]
    module: nn.Module
    """what was compiled"""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[str, torch.dtype] | None
    """device type and dtype of the autocast around the call"""
    line: str


def compiled_class() -> Any:
    """Returns the class of the modules that torch.compile returns, None where no compiler is
    loaded."""
    return getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)


@contextmanager
def kept_calls(line: Callable[[], str]) -> Iterator[list[Kept]]:
    """Returns a context that yields the first call of each compiled module that no other one
    contains. `line` says which line of the program makes it."""
    calls: dict[int, Kept] = {}
    kind, depth = compiled_class(), 0
    if kind is None:
        yield []
        return
    plain = kind.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        module = dict(self.named_children()).get("_orig_mod")
        if module is not None and not depth and id(self) not in calls and torch.is_grad_enabled():
            own_args, own_kwargs = tree_map(_copied, (args, kwargs))
            autocast = _autocast(module)
            calls[id(self)] = Kept(self, module, own_args, own_kwargs, autocast, line())
        depth += 1
        try:
            with warnings.catch_warnings():  # our hooks are meant to fire
                warnings.filterwarnings("ignore", "Using `torch.compile")
                return plain(self, *args, **kwargs)
        finally:
            depth -= 1

    own = kind.__dict__.get("__call__")
    kind.__call__ = call
    found: list[Kept] = []
    try:
        yield found
    finally:
        if own is None:
            del kind.__call__
        else:
            kind.__call__ = own
        found += calls.values()


def _copied(x: Any) -> Any:
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def _autocast(module: nn.Module) -> tuple[str, torch.dtype] | None:
    device = next((p.device.type for p in module.parameters()), "cpu")
    enabled = torch.is_autocast_enabled(device)
    return (device, torch.get_autocast_dtype(device)) if enabled else None


def enter(kept: Kept, docket: Docket, places: Places, step: int) -> None:
    """Enters what a compiled module computed in the docket, or why it was not judged."""
    path = places.names.get(kept.module, "").removeprefix("_orig_mod").removeprefix(".")
    path = path or type(kept.module).__name__
    try:
        judgement = _judge_boundary(kept, docket.least_z)
    except Exception as error:  # not every module can be copied and run again
        text = str(error).strip().splitlines() or [type(error).__name__]
        docket.leave_out(f"compiled {path}", f"it cannot be run again: {text[0]:.100}", 0.0)
    else:
        place = Place(path, kept.line, "forward and backward")
        docket.add(f"compiled {path}", place, step, judgement, 0.0)


def _why_not(module: nn.Module) -> str:
    """Returns why a module is not run again, "" where it is."""
    weights = list(module.parameters())
    if isinstance(module, nn.parallel.DistributedDataParallel) or any(
        type(w) is not nn.Parameter or type(w.data) is not Tensor for w in weights
    ):
        return "it is spread over ranks, or its weights have a class of their own"
    if sum(w.numel() for w in weights) > MAX_WEIGHTS:
        return f"it has more than {MAX_WEIGHTS} weights"
    return ""


def _judge_boundary(kept: Kept, z: float) -> Judgement:
    """Judges the outputs of a compiled module and its gradients in a random direction, on the
    arguments of the call and the weights of now. Only the errors' sizes are judged: rows that went
    through many operators do not err independently. Raises NotImplementedError with the reason
    where it cannot be judged."""
    if reason := _why_not(kept.module):
        raise NotImplementedError(reason)
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(SEED)
        actual = _of_compiled(kept)
        plain = [_of_copy(kept, None, seed) for seed in (1, 2)]
        if any(not torch.equal(y, plain[1].get(n, y)) for n, y in plain[0].items()):
            raise NotImplementedError("it draws random numbers")
        exact = _of_copy(kept, torch.float64, mode=Exact())
        sizes = [max(t.shape, default=1) for t in kept.module.parameters()]
        sizes += [t.numel() // max(t.shape[-1:], default=1) for t in _tensors(kept)]
        return judge_sizes(actual, exact, _variations(kept, plain[0]), max(sizes), z)


def _tensors(kept: Kept) -> list[Tensor]:
    return [x for x in tree_leaves((kept.args, kept.kwargs)) if isinstance(x, Tensor)]


def _variations(kept: Kept, plain: Results) -> Iterator[Results]:
    """Yields what the module computes in other honest ways: without the compiler, sums cut in two,
    weights and arguments moved by a rounding; below float32 also in float32, and with intermediates
    rounded."""
    yield plain
    dtypes = {y.dtype for y in plain.values()} | {p.dtype for p in kept.module.parameters()}
    low = [d for d in (*dtypes, *([kept.autocast[1]] if kept.autocast else [])) if d in LOW]
    for seed in (1, 2):
        yield _of_copy(kept, None, mode=Regrouped(seed))
        yield _of_copy(kept, torch.float64, seed, Exact(), moves=True)
    if low:
        yield _of_copy(kept, torch.float32)
        for seed in (1, 2):
            yield _of_copy(kept, torch.float32, mode=Rounded(low[0], 2, seed=seed))


def _of_compiled(kept: Kept) -> Results:
    """Runs the compiled module, and takes back what it wrote into the module's buffers."""
    before = {n: b.clone() for n, b in kept.module.named_buffers()}
    around = torch.autocast(*kept.autocast) if kept.autocast else nullcontext()
    try:
        with around, torch.compiler.set_stance("default"):
            return _results(kept.compiled, kept.module, kept.args, kept.kwargs)
    finally:
        with torch.no_grad():
            for name, buffer in kept.module.named_buffers():
                buffer.copy_(before[name])


def _of_copy(
    kept: Kept,
    dtype: torch.dtype | None,
    seed: int = 1,
    mode: AbstractContextManager[Any] | None = None,
    moves: bool = False,
) -> Results:
    """Runs a copy of the module on the host, in this dtype (None: its own, under the program's
    autocast); `moves` moves its weights and arguments by a rounding."""
    torch.manual_seed(seed)
    module = copy.deepcopy(kept.module).cpu()
    module = module.to(dtype) if dtype else module
    change = moved(seed)

    def converted(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        y = x.detach().cpu()
        if dtype and x.is_floating_point():
            y = y.to(dtype)
            y = change(y) if moves else y
        return y.requires_grad_(x.requires_grad)

    if moves:
        with torch.no_grad():
            for weight in module.parameters():
                weight.copy_(change(weight))
    around: AbstractContextManager[Any] = nullcontext()
    if kept.autocast and dtype is None:
        around = torch.autocast("cpu", kept.autocast[1])
    args, kwargs = tree_map(converted, (kept.args, kept.kwargs))
    with around, torch.compiler.set_stance("force_eager"), mode or nullcontext():
        return _results(module, module, args, kwargs)


def _results(function: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Results:
    """Returns outputs and gradients on the host. Gradients are those of the sum of all outputs,
    each multiplied by random numbers."""
    outputs = [y for y in tree_leaves(function(*args, **kwargs)) if isinstance(y, Tensor)]
    outputs = [y for y in outputs if y.is_floating_point()]
    results = {f"output {i}": y.detach().cpu() for i, y in enumerate(outputs)}
    wanted: dict[str, Tensor] = {
        f"gradient of {n}": p for n, p in module.named_parameters() if p.requires_grad
    }
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]
    wanted |= {f"gradient of argument {i}": x for i, x in enumerate(given)}
    ends = [y for y in outputs if y.requires_grad]
    if not wanted or not ends:
        return results
    generator = torch.Generator("cpu").manual_seed(SEED)
    drawn = [torch.randn(y.shape, generator=generator, device="cpu") for y in ends]
    directions = [d.to(y.device, y.dtype) for d, y in zip(drawn, ends, strict=True)]
    gradients = torch.autograd.grad(ends, list(wanted.values()), directions, allow_unused=True)
    named = zip(wanted, gradients, strict=True)
    return results | {n: g.detach().cpu() for n, g in named if g is not None}
