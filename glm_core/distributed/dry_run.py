"""Does a training step of one rank of a plan without the other ranks and without memory. The real
engine runs on fake tensors and a fake process group; its storages and messages are counted."""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glm_core.backends.base import Backend
from glm_core.backends.registry import use
from glm_core.config import RunConfig
from glm_core.data.sampler import Batch
from glm_core.distributed import apply, layout, mesh
from glm_core.distributed.parallel import ManyProcesses
from glm_core.distributed.plan import Plan, require_fit
from glm_core.errors import ConfigError, GlmCoreError
from glm_core.training.optimizer import own_part
from glm_core.training.trainer import Trainer
from glm_core.versions import lack_of

COLLECTIVES = {
    "all_reduce": "all_reduce",
    "allreduce_": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "_allgather_base_": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "recv",
    "allgather_": "all_gather",
    "barrier": "barrier",
}
"""by torch's operator: the name it is counted under. Its bytes are those of its largest tensor, the
whole array, as nccl-tests counts"""
DIMS = {-3: "experts", -2: "rows", -1: "columns"}
"""what a matrix is split into, by dim from the last"""
Phase = str
"""what a storage holds: weights, optimizer, activations (of a forward pass), gradients,
temporary"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What one rank would hold and send."""

    rank: int
    place: dict[str, int]
    """coordinates in the mesh: pp, dp, tp"""
    device_type: str
    parameters: dict[str, tuple[int, ...]]
    """shapes this rank holds, by the whole model's names"""
    placement: dict[str, str]
    """by the same names: which part of the whole tensor the rank holds"""
    peak_bytes: int
    memory: dict[str, int]
    """bytes at the peak, by what they hold"""
    collectives: dict[str, dict[str, int]]
    """by name: {count, bytes} of one step"""
    seconds: float
    """that the dry run took"""


class Meter(TorchDispatchMode):
    """Counts storages and collectives. A storage belongs to the phase in which it was allocated."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.phase: Phase = "weights"
        self.sizes: dict[int, tuple[Phase, int]] = {}
        self.references: dict[int, Any] = {}
        self.now: Counter[Phase] = Counter()
        self.peak, self.at_peak = 0, Counter[Phase]()
        self.sent: dict[str, Counter[str]] = defaultdict(Counter)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # its fake allocates a tensor, the real operator does not
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor.is_meta:  # a fake tensor is on its device
                self.add(tensor)
        space, _, name = func._schema.name.partition("::")
        if space in ("c10d", "_c10d_functional") and name in COLLECTIVES:
            self._send(COLLECTIVES[name], (args, result))
        return result

    def add(self, tensor: Tensor, phase: Phase | None = None) -> None:
        """Counts the tensor's storage. A storage that is known already is counted again only where
        its size or, by `phase`, its phase has changed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self.sizes.get(key)
        if known is not None and (known[1] == size and phase in (None, known[0])):
            return
        if known is not None:
            self.now[known[0]] -= known[1]
        else:
            self.references[key] = weakref.ref(storage, lambda _: self._free(key))
        self.sizes[key] = (phase or (known[0] if known else self.phase), size)
        self.now[self.sizes[key][0]] += size
        if (total := self.now.total()) > self.peak:
            self.peak, self.at_peak = total, Counter(self.now)

    def _free(self, key: int) -> None:
        phase, size = self.sizes.pop(key)
        del self.references[key]
        self.now[phase] -= size

    def _send(self, name: str, values: Any) -> None:
        tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
        if name in ("send", "recv") and tensors[0].numel() == 1:
            return  # torch's greeting between stages: in a run's first step, and not in every torch
        self.sent[name]["count"] += 1
        self.sent[name]["bytes"] += max((t.numel() * t.element_size() for t in tensors), default=0)


def lack() -> str:
    """Returns why this torch can do no dry run, or ""."""
    return lack_of("fake_collectives", "a dry run")


def run(config: RunConfig, plan: Plan, rank: int, backend: Backend) -> Report:
    """Builds rank `rank` of the plan's job and does one step. Raises ConfigError with the error
    that the rank of a real cluster would end with, and where `lack` has a reason."""
    if reason := lack():
        raise ConfigError(reason)
    if not 0 <= rank < plan.world:
        raise ConfigError(f"rank {rank}: the plan has ranks 0 to {plan.world - 1}")
    c = config
    require_fit(
        plan, c.model, world=plan.world, global_batch=c.train.global_batch, length=c.data.length
    )
    begin = time.perf_counter()
    dist.init_process_group("fake", rank=rank, world_size=plan.world, store=FakeStore())
    try:
        return _report(config, plan, backend, begin)
    except GlmCoreError:
        raise
    except Exception as error:  # a rank of a cluster would raise the same
        fact = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"plan {plan.label()}: rank {rank} would end with {fact}") from error
    finally:
        dist.destroy_process_group()


def _report(config: RunConfig, plan: Plan, backend: Backend, begin: float) -> Report:
    device = backend.device()
    axes = mesh.make(plan, device.type)
    meter = Meter()
    # both read ranks: not possible on fakes
    ends = mesh.ends_group(axes) if plan.pp > 1 else None
    experts = mesh.make_for_experts(plan, axes)
    with FakeTensorMode(allow_non_fake_inputs=True), use(backend), _resizing(meter):
        # values are not needed; torch 2.13 cannot convert a fake parameter in place
        with (
            mock.patch.object(apply, "own_values", return_value={}),
            mock.patch.object(nn.Module, "_apply", _converted),
            mock.patch.object(mesh, "ends_group", return_value=ends),
            mock.patch.object(mesh, "make_for_experts", return_value=experts),
        ):
            parallel = ManyProcesses(config, plan, axes, backend, device)
            trainer = Trainer(config, Zeros(config.data.length), parallel)
        _classify(meter, trainer)
        meter.sent.clear()
        _step(meter, trainer)
    named = dict(trainer.model.named_parameters())
    return Report(
        rank=dist.get_rank(),
        device_type=device.type,
        peak_bytes=meter.peak,
        place={a: axes.get_local_rank(a) for a in mesh.AXES},
        memory=dict(meter.at_peak),
        parameters={n: tuple(own_part(p).shape) for n, p in named.items()},
        placement={n: _place(n, p, parallel) for n, p in named.items()},
        collectives={k: dict(v) for k, v in sorted(meter.sent.items())},
        seconds=time.perf_counter() - begin,
    )


def _converted(
    module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True
) -> Any:
    """Replaces nn.Module._apply: puts new parameters where it converts in place."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for name, p in module._parameters.items():
        if p is not None:
            module._parameters[name] = nn.Parameter(function(p.detach()), p.requires_grad)
    return module


def _classify(meter: Meter, trainer: Trainer) -> None:
    """Marks the storages that exist before the step as weights or optimizer, and resets the peak,
    which building them has reached."""
    for p in trainer.model.parameters():
        meter.add(own_part(p), "weights")
    optimizer = trainer.optimizer
    for table in (optimizer.master, optimizer.exp_avg, optimizer.exp_avg_sq):
        for tensor in table.values():
            if optimizer.low_precision or table is not optimizer.master:
                meter.add(tensor, "optimizer")
    meter.peak, meter.at_peak = 0, Counter()


class Zeros:
    """Draws sequences of token 0."""

    def __init__(self, length: int) -> None:
        self.length = length

    def next(self, micro_batch: int) -> Batch:
        ids = torch.zeros(micro_batch, self.length, dtype=torch.int64)
        place = torch.zeros(micro_batch, 2, self.length, dtype=torch.int64)
        where = torch.zeros(micro_batch, self.length, dtype=torch.int32)
        return Batch(ids, ids, torch.ones(micro_batch, self.length), place, where, where)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing moves."""


def _step(meter: Meter, trainer: Trainer) -> None:
    """Does one step, phase by phase."""
    batch = trainer.sampler.next(trainer.config.train.global_batch)
    meter.phase = "activations"
    handles = [
        p.register_post_accumulate_grad_hook(lambda p: _gradient(meter, p))
        for p in trainer.model.parameters()
    ]
    with meter, _backwards(meter):
        trainer.backward([batch])
        meter.phase = "temporary"
        trainer.optimizer.step(1e-4, trainer.loss_scale.scale)
    for handle in handles:
        handle.remove()


def _gradient(meter: Meter, p: Tensor) -> None:
    if p.grad is not None:
        meter.add(own_part(p.grad), "gradients")


@contextmanager
def _backwards(meter: Meter) -> Iterator[None]:
    """Counts what a backward pass allocates as temporary."""
    real = torch.autograd.backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        before, meter.phase = meter.phase, "temporary"
        try:
            return real(*args, **kwargs)
        finally:
            meter.phase = before

    with mock.patch.object(torch.autograd, "backward", backward):
        yield


@contextmanager
def _resizing(meter: Meter) -> Iterator[None]:
    """Sees the resizing of storages, by which FSDP frees gathered weights: no operator shows it."""
    real: Callable[..., Any] = torch.UntypedStorage.resize_

    def resize(storage: Any, size: int) -> Any:
        result = real(storage, size)
        known = meter.sizes.get(storage._cdata)
        if known is not None:
            meter.now[known[0]] += storage.nbytes() - known[1]
            meter.sizes[storage._cdata] = (known[0], storage.nbytes())
        return result

    with mock.patch.object(torch.UntypedStorage, "resize_", resize):
        yield


def _place(name: str, p: Tensor, parallel: ManyProcesses) -> str:
    """Says which part a rank holds: `rows 0:3072, 12288:15360; of these rows 0:100 (ZeRO)`."""
    parts = []
    for split in layout.splits_of(name, parallel.config.model, parallel.place):
        spans = ", ".join(f"{start}:{start + length}" for start, length in split.spans)
        parts.append(f"{DIMS[split.dim - p.ndim]} {spans}")
    words = "; ".join(parts) or "whole"
    if not isinstance(p, DTensor):
        return words
    # DTensor keeps results by mesh without its rank: an earlier dry run's mesh may be in p
    own = parallel.mesh["dp"]
    if parallel.experts is not None and layout.is_expert(name):
        own = parallel.experts["expert_dp"]
    first, rows = apply.own_rows(p, own)
    unit = DIMS[-p.ndim] if p.ndim > 1 else "rows"
    return f"{words}; of these {unit} {first}:{first + rows} (ZeRO)"
