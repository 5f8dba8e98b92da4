"""Recomputes activations by torch's non-reentrant checkpoint (`deepspeed.checkpointing`). Decides
where its inputs are kept until the backward pass, and makes every random generator draw the same
numbers again."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import checkpoint as torch_checkpoint

from glm_core import dispatch
from glm_core.deepspeed.accelerator.real_accelerator import get_accelerator
from glm_core.deepspeed.keys import SECTIONS
from glm_core.deepspeed.notices import say_once
from glm_core.deepspeed.settings import judge, read
from glm_core.errors import ConfigError
from glm_core.versions import all_gather_single

MODEL_PARALLEL = "model-parallel-rng"
"""the name of the tracker's default state"""


class CudaRNGStatesTracker:
    """Named states of the device's random generator, whatever the device. Inside `fork` the
    generator draws from one of them."""

    def __init__(self) -> None:
        self.states_: dict[str, Tensor] = {}
        self.seeds_: set[int] = set()

    def reset(self) -> None:
        """Removes all states."""
        self.states_, self.seeds_ = {}, set()

    def get_states(self) -> dict[str, Tensor]:
        """Returns the states by name, as they are now."""
        return dict(self.states_)

    def set_states(self, states: dict[str, Tensor]) -> None:
        """Sets the states that `get_states` returned."""
        self.states_ = states

    def add(self, name: str, seed: int) -> None:
        """Adds a state. Raises ConfigError where the name or the seed is taken already."""
        if name in self.states_ or seed in self.seeds_:
            raise ConfigError(f"rng tracker: {name!r} or seed {seed} is taken already; call reset")
        device = get_accelerator()
        before = device.get_rng_state()
        device.manual_seed(seed)
        self.states_[name] = device.get_rng_state()
        self.seeds_.add(seed)
        device.set_rng_state(before)

    @contextlib.contextmanager
    def fork(self, name: str = MODEL_PARALLEL) -> Iterator[None]:
        """Draws from this state inside the block; afterwards the generator is as it was before."""
        if name not in self.states_:
            raise ConfigError(
                f"rng tracker: no state {name!r}; call model_parallel_cuda_manual_seed"
            )
        device = get_accelerator()
        before = device.get_rng_state()
        device.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = device.get_rng_state()
            device.set_rng_state(before)


@dataclasses.dataclass(slots=True)
class _State:
    """What `configure` has set."""

    configured: bool = False
    mpu: Any = None
    partition: bool = False
    """keep inputs in equal parts on the tensor-parallel ranks"""
    in_cpu: bool = False
    """keep inputs in host memory"""


_state = _State()
_tracker = CudaRNGStatesTracker()


def get_cuda_rng_tracker() -> CudaRNGStatesTracker:
    """Returns this process's one tracker."""
    return _tracker


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seeds the device's generator with `seed`, the same on all tensor-parallel ranks, and the
    tracker's default state with seed + 2718 + the tensor-parallel rank (as Megatron-LM and
    DeepSpeed do)."""
    _tracker.reset()
    get_accelerator().manual_seed(seed)
    _tracker.add(MODEL_PARALLEL, seed + 2718 + _slices()[0])


def model_parallel_reconfigure_tp_seed(seed: int) -> None:
    """Seeds the tracker's default state again."""
    with _tracker.fork():
        get_accelerator().manual_seed(seed + 2718 + _slices()[0])


def _slices() -> tuple[int, int, dist.ProcessGroup | None]:
    """Returns the tensor-parallel rank, size and group from the mpu."""
    mpu = _state.mpu
    kind = "tensor_model" if hasattr(mpu, "get_tensor_model_parallel_rank") else "model"
    if mpu is None:
        return 0, 1, None
    rank, world_size, group = (
        getattr(mpu, f"get_{kind}_parallel_{what}")() for what in ("rank", "world_size", "group")
    )
    return rank, world_size, group


def configure(
    mpu_: Any,
    deepspeed_config: str | Path | Mapping[str, Any] | None = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Sets how a checkpoint's inputs are kept. partition_activations: in equal parts on the
    tensor-parallel ranks, whose inputs must be the same; checkpoint_in_cpu: in host memory. Where
    they are None the config's activation_checkpointing section decides. The other arguments have no
    effect. Raises ConfigError."""
    section: dict[str, Any] = {}
    if deepspeed_config is not None:
        section = dict(read(deepspeed_config).get("activation_checkpointing", {}))
        bad: list[str] = []
        judge(section, SECTIONS["activation_checkpointing"], "activation_checkpointing.", bad)
        if bad:
            raise ConfigError("; ".join(bad))
    without_effect = {
        "contiguous_checkpointing": contiguous_checkpointing,
        "synchronize": synchronize,
        "num_checkpoints": num_checkpoints,
        "profile": profile,
    }
    for name in (n for n, value in without_effect.items() if value):
        say_once(f"checkpointing.configure: {name} has no effect; results are the same")
    partition = (partition_activations, section.get("partition_activations"))
    in_cpu = (checkpoint_in_cpu, section.get("cpu_checkpointing"))
    _state.configured, _state.mpu = True, _state.mpu if mpu_ is None else mpu_
    _state.partition = bool(next((v for v in partition if v is not None), False))
    _state.in_cpu = bool(next((v for v in in_cpu if v is not None), False))


def is_configured() -> bool:
    """Was `configure` called?"""
    return _state.configured


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    """Sets `configure`'s partition_activations from now on."""
    _state.partition = partition_activation


def set_num_layers(nlayers: int) -> None:
    """Does nothing: there are no buffers whose size depends on it."""


def reset() -> None:
    """Does nothing: nothing is kept outside autograd's graph."""


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Returns function(*args, **kwargs) and keeps only its arguments for the backward pass, which
    computes it again. Parameters inside get gradients even where no argument requires one (in
    DeepSpeed's reentrant checkpoint they get none)."""
    with _stored_inputs() if _state.partition or _state.in_cpu else contextlib.nullcontext():
        return torch_checkpoint.checkpoint(
            function,
            *args,
            use_reentrant=False,
            preserve_rng_state=True,
            context_fn=_contexts,
            **kwargs,
        )


non_reentrant_checkpoint = checkpoint


class CheckpointFunction:
    """Megatron-LM's way to call `checkpoint`: apply(function, outputs, *args)."""

    @staticmethod
    def apply(run_function: Callable[..., Any], all_outputs: list[Any], *args: Any) -> Any:
        """Runs checkpoint(run_function, *args) and appends its outputs to all_outputs too."""
        outputs = checkpoint(run_function, *args)
        all_outputs += outputs if isinstance(outputs, tuple) else [outputs]
        return outputs


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Returns the contexts of the forward and of its recomputation. Both use the same backend, and
    the recomputation starts from the tracker's states as they are now."""
    session = dispatch.session()
    return dispatch.resume(session), _recomputing(session, _tracker.get_states())


@contextlib.contextmanager
def _recomputing(session: Any, states: dict[str, Tensor]) -> Iterator[None]:
    later = _tracker.get_states()
    _tracker.set_states(dict(states))
    try:
        with dispatch.resume(session):
            yield
    finally:
        _tracker.set_states(later)


class _Part(NamedTuple):
    """An input as it is stored until the backward pass."""

    own: Tensor
    shape: torch.Size
    device: torch.device
    group: dist.ProcessGroup | None
    """the ranks that store the other parts; None: it is whole"""


def _stored_inputs() -> AbstractContextManager[None]:
    """Stores a checkpoint's inputs as `configure` says. What autograd saves inside the checkpoint
    does not pass through these hooks."""
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


def _pack(x: Tensor) -> _Part:
    rank, ranks, group = _slices()
    own, num_elements = x.detach(), x.numel()
    parted = _state.partition and x.is_floating_point() and num_elements >= ranks > 1
    if parted:
        part_size = -(-num_elements // ranks)
        padding = part_size * ranks - num_elements
        padded = torch.nn.functional.pad(own.reshape(-1), (0, padding))
        own = padded[rank * part_size : (rank + 1) * part_size].clone()
    if _state.in_cpu:
        own = own.cpu()
    return _Part(own, x.shape, x.device, group if parted else None)


def _unpack(part: _Part) -> Tensor:
    own = part.own.to(part.device)
    if part.group is None:
        return own
    padded = own.new_empty(len(own) * dist.get_world_size(part.group))
    all_gather_single(padded, own, group=part.group)
    return padded[: part.shape.numel()].view(part.shape)
