"""`deepspeed.checkpointing`: torch's non-reentrant checkpoint, in which every generator draws again
what it drew, and where its inputs are kept until the backward pass."""

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
from glm_core.deepspeed import accelerator
from glm_core.deepspeed.keys import SECTIONS
from glm_core.deepspeed.settings import judge, read, say_once
from glm_core.errors import ConfigError

MODEL_PARALLEL = "model-parallel-rng"
"""the tracker's default name"""


class CudaRNGStatesTracker:
    """Named states of the device's generator (whatever the device), each drawn from inside its own
    `fork`."""

    def __init__(self) -> None:
        self.states_: dict[str, Tensor] = {}
        self.seeds_: set[int] = set()

    def reset(self) -> None:
        """No states."""
        self.states_, self.seeds_ = {}, set()

    def get_states(self) -> dict[str, Tensor]:
        """By name, as they are now."""
        return dict(self.states_)

    def set_states(self, states: dict[str, Tensor]) -> None:
        """What `get_states` returned."""
        self.states_ = states

    def add(self, name: str, seed: int) -> None:
        """A new state. Raises ConfigError where the name or the seed is there already."""
        if name in self.states_ or seed in self.seeds_:
            raise ConfigError(f"rng tracker: {name!r} or seed {seed} is there already; call reset")
        device = accelerator.get_accelerator()
        before = device.get_rng_state()
        device.manual_seed(seed)
        self.states_[name] = device.get_rng_state()
        self.seeds_.add(seed)
        device.set_rng_state(before)

    @contextlib.contextmanager
    def fork(self, name: str = MODEL_PARALLEL) -> Iterator[None]:
        """Inside, the device's generator goes on from this state."""
        if name not in self.states_:
            raise ConfigError(
                f"rng tracker: no state {name!r}; call model_parallel_cuda_manual_seed"
            )
        device = accelerator.get_accelerator()
        before = device.get_rng_state()
        device.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = device.get_rng_state()
            device.set_rng_state(before)


@dataclasses.dataclass(slots=True)
class _State:
    """What `configure` decided."""

    configured: bool = False
    mpu: Any = None
    partition: bool = False
    in_cpu: bool = False


_state = _State()
_tracker = CudaRNGStatesTracker()


def get_cuda_rng_tracker() -> CudaRNGStatesTracker:
    """One object per process."""
    return _tracker


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """The default state by `seed`, the same on all tensor-parallel ranks; the tracker's by
    seed + 2718 + the tensor-parallel rank (as Megatron-LM and DeepSpeed do)."""
    _tracker.reset()
    accelerator.get_accelerator().manual_seed(seed)
    _tracker.add(MODEL_PARALLEL, seed + 2718 + _slices()[0])


def model_parallel_reconfigure_tp_seed(seed: int) -> None:
    """The tracker's state anew, by another seed."""
    with _tracker.fork():
        accelerator.get_accelerator().manual_seed(seed + 2718 + _slices()[0])


def _slices() -> tuple[int, int, dist.ProcessGroup | None]:
    """Tensor-parallel rank, size and group, as the mpu names them."""
    mpu = _state.mpu
    kind = "tensor_model" if hasattr(mpu, "get_tensor_model_parallel_rank") else "model"
    if mpu is None:
        return 0, 1, None
    ask = [
        getattr(mpu, f"get_{kind}_parallel_{what}")() for what in ("rank", "world_size", "group")
    ]
    return ask[0], ask[1], ask[2]


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
    """partition_activations: a checkpoint's inputs are kept in equal parts by the tensor-parallel
    ranks, which must all have the same. checkpoint_in_cpu: they are kept in host memory. Both are
    the config's activation_checkpointing section's where not given. The others have no effect.
    Raises ConfigError."""
    section: dict[str, Any] = {}
    if deepspeed_config is not None:
        section = dict(read(deepspeed_config).get("activation_checkpointing", {}))
        bad: list[str] = []
        judge(section, SECTIONS["activation_checkpointing"], "activation_checkpointing.", bad)
        if bad:
            raise ConfigError("; ".join(bad))
    idle = {
        "contiguous_checkpointing": contiguous_checkpointing,
        "synchronize": synchronize,
        "num_checkpoints": num_checkpoints,
        "profile": profile,
    }
    for name in (n for n, value in idle.items() if value):
        say_once(f"checkpointing.configure: {name} has no effect; results are the same")
    given = (partition_activations, section.get("partition_activations"))
    cpu = (checkpoint_in_cpu, section.get("cpu_checkpointing"))
    _state.configured, _state.mpu = True, _state.mpu if mpu_ is None else mpu_
    _state.partition = bool(next((v for v in given if v is not None), False))
    _state.in_cpu = bool(next((v for v in cpu if v is not None), False))


def is_configured() -> bool:
    """Was `configure` called?"""
    return _state.configured


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    """As `configure`'s argument, from now on."""
    _state.partition = partition_activation


def set_num_layers(nlayers: int) -> None:
    """Taken; there are no buffers whose size depended on it."""


def reset() -> None:
    """Taken; nothing is kept outside autograd's graph."""


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), of which nothing but the arguments is kept for the backward pass.
    Inputs need no gradient for the parameters inside to get theirs (DeepSpeed's own, reentrant,
    gives them none then)."""
    with _kept() if _state.partition or _state.in_cpu else contextlib.nullcontext():
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
    """The name under which Megatron-LM calls it: apply(function, outputs, *args)."""

    @staticmethod
    def apply(run_function: Callable[..., Any], all_outputs: list[Any], *args: Any) -> Any:
        """checkpoint(run_function, *args), whose outputs are also appended to all_outputs."""
        found = checkpoint(run_function, *args)
        all_outputs += found if isinstance(found, tuple) else [found]
        return found


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Of the forward, and of its repetition: the same backend, the tracker's states as now."""
    session = dispatch.session()
    return dispatch.resume(session), _again(session, _tracker.get_states())


@contextlib.contextmanager
def _again(session: Any, states: dict[str, Tensor]) -> Iterator[None]:
    later = _tracker.get_states()
    _tracker.set_states(dict(states))
    try:
        with dispatch.resume(session):
            yield
    finally:
        _tracker.set_states(later)


class _Part(NamedTuple):
    """An input as it is kept."""

    own: Tensor
    shape: torch.Size
    device: torch.device
    group: dist.ProcessGroup | None
    """over which the rest is; None: it is whole"""


def _kept() -> AbstractContextManager[None]:
    """Only a checkpoint's inputs pass through these hooks: what is saved inside it does not."""
    return torch.autograd.graph.saved_tensors_hooks(_keep, _whole)


def _keep(x: Tensor) -> _Part:
    rank, ranks, group = _slices()
    own, parted = x.detach(), _state.partition and x.is_floating_point() and x.numel() >= ranks > 1
    if parted:
        each = -(-x.numel() // ranks)
        padded = torch.nn.functional.pad(own.reshape(-1), (0, each * ranks - x.numel()))
        own = padded[rank * each : (rank + 1) * each].clone()
    if _state.in_cpu:
        own = own.cpu()
    return _Part(own, x.shape, x.device, group if parted else None)


def _whole(part: _Part) -> Tensor:
    own = part.own.to(part.device)
    if part.group is None:
        return own
    whole = own.new_empty(len(own) * dist.get_world_size(part.group))
    dist.all_gather_single(whole, own, group=part.group)
    return whole[: part.shape.numel()].view(part.shape)
