"""Builds modules with partitioned parameters, and gathers such parameters for a while
(`deepspeed.zero`)."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from glm_core.deepspeed.accelerator import real_accelerator
from glm_core.deepspeed.comm import init_distributed
from glm_core.deepspeed.notices import say_once
from glm_core.deepspeed.settings import read
from glm_core.distributed import fsdp
from glm_core.distributed.split import Split, gathered, split_module
from glm_core.errors import ConfigError, GlmCoreError


class ZeroParamStatus(Enum):
    """The values of `param.ds_status` of a partitioned parameter: AVAILABLE inside
    GatheredParameters, else NOT_AVAILABLE."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


_ids = itertools.count()


class LostChange(GlmCoreError, RuntimeError):
    """A change of a gathered parameter that no rank would keep; a RuntimeError, as in DeepSpeed."""


def mark(params: Iterable[Tensor], sanity_checks: bool) -> None:
    """Gives partitioned parameters the attributes by which scripts know DeepSpeed's: ds_id,
    ds_shape, ds_numel, ds_status, ds_tensor (this rank's elements, as a vector), ds_persist (False:
    none stays whole between layers) and ds_enable_sanity_checks."""
    for p in params:
        if isinstance(p, Split | DTensor) and not hasattr(p, "ds_id"):
            own = p.part if isinstance(p, Split) else p.to_local()
            values: dict[str, Any] = {
                "ds_id": next(_ids),
                "ds_shape": p.shape,
                "ds_numel": p.numel(),
                "ds_status": ZeroParamStatus.NOT_AVAILABLE,
                "ds_tensor": own.detach().view(-1),
                "ds_persist": False,
                "ds_enable_sanity_checks": sanity_checks,
            }
            for name, value in values.items():
                setattr(p, name, value)


@contextmanager
def _available(params: Sequence[Tensor]) -> Iterator[None]:
    """Makes the parameters' ds_status AVAILABLE inside the block."""
    marked = [p for p in params if hasattr(p, "ds_status")]
    for p in marked:
        p.ds_status = ZeroParamStatus.AVAILABLE
    try:
        yield
    finally:
        for p in marked:
            p.ds_status = ZeroParamStatus.NOT_AVAILABLE


class Init:
    """Inside the block a module's parameters are partitioned over the data-parallel ranks as soon
    as it becomes part of another module, and those of the others at the block's end (where blocks
    are nested, that of the block in which it was made). So a rank holds its share of the model and
    one layer whole. Values are the first rank's, the same as
    without the block. See distributed.split.Split for what may be done with such a parameter before
    `initialize`."""

    _open: ClassVar[list[Init]] = []

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: str | Path | Mapping[str, Any] | None = None,
        config: str | Path | Mapping[str, Any] | None = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        **_unused: Any,
    ) -> None:
        """Has no effect where the config asks for another stage than ZeRO 3. module: partitioned at
        once; dtype: has no effect, masters are float32. Raises ConfigError for a remote_device
        other than the CPU."""
        if remote_device not in (None, "none", "cpu"):
            raise ConfigError(
                f"zero.Init: remote_device={remote_device!r}: would keep rows on NVMe; remove it"
            )
        config = config if config_dict_or_path is None else config_dict_or_path
        zero = {"stage": 3} if config is None else read(config).get("zero_optimization", {})
        self.enabled = enabled and zero.get("stage", 0) == 3
        self.sanity_checks = bool(zero.get("enable_sanity_checks", False))
        if not self.enabled:
            return
        init_distributed()
        self.group = data_parallel_group
        if self.group is None:
            self.group = dist.group.WORLD if mpu is None else mpu.get_data_parallel_group()
        if module is not None:
            self._partition(module)

    def __enter__(self) -> Init:
        if self.enabled and not Init._open:
            # in the order of their making, which is the same on all ranks
            self._made: list[weakref.ref[nn.Module]] = []
            self._parents: list[weakref.ref[nn.Module]] = []
            self._hook = register_module_module_registration_hook(self._registered)
            self._init, self._apply = nn.Module.__init__, nn.Module.apply
            nn.Module.__init__ = self._noting(self._init)  # type: ignore[method-assign]  # until exit
            nn.Module.apply = _gathering(self._apply)  # type: ignore[method-assign]  # until exit
        if self.enabled:
            Init._open.append(self)
            self._first = len(Init._open[0]._made)
        return self

    def __exit__(self, *error: object) -> None:
        if not self.enabled:
            return
        whole = Init._open[0]._made[self._first :]
        Init._open.remove(self)
        if not Init._open:
            self._hook.remove()
            nn.Module.__init__ = self._init  # type: ignore[method-assign]  # torch's own again
            nn.Module.apply = self._apply  # type: ignore[method-assign]  # torch's own again
            whole += self._parents
        gc.collect()  # else a dead module might live on some ranks only
        for made in whole:
            if (module := made()) is not None:
                self._partition(module)

    def _noting(self, init: Callable[..., None]) -> Callable[..., None]:
        def noted(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            self._made.append(weakref.ref(module))
            init(module, *args, **kwargs)

        return noted

    def _registered(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        self._parents.append(weakref.ref(parent))  # it may be older than the block
        if child is not None:
            self._partition(child)

    def _partition(self, module: nn.Module) -> None:
        split_module(module, self.group, real_accelerator.device())
        mark(module.parameters(), self.sanity_checks)


_orig_torch_arange = torch.arange


def zero_wrapper_for_fp_tensor_constructor(fn: Callable[..., Any], *_: Any) -> Callable[..., Any]:
    """Returns `fn`: inside `Init` tensors are made as the script says. Transformers replaces this
    function for a while."""
    return fn


def _own(module: nn.Module) -> Iterator[Tensor | None]:
    yield from module._parameters.values()


def _gathering(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps nn.Module.apply so that its function sees each module's own parameters whole."""

    def applied(self: nn.Module, function: Callable[[nn.Module], Any]) -> nn.Module:
        def whole(module: nn.Module) -> None:
            own = [p for p in _own(module) if isinstance(p, Split)]
            with gathered(own, 0):
                function(module)

        result: nn.Module = apply(self, whole)
        return result

    return applied


@contextmanager
def GatheredParameters(
    params: nn.Parameter | Iterable[nn.Parameter],
    modifier_rank: int | None = None,
    fwd_module: nn.Module | None = None,
    enabled: bool = True,
) -> Iterator[None]:
    """Makes the parameters whole inside the block, for torch's functions and methods too that a
    script calls on a parameter it holds. Changes last only with modifier_rank, whose values all
    ranks get; without it they are a LostChange where the config's enable_sanity_checks is on."""
    chosen = [params] if isinstance(params, Tensor) else list(params)
    splits = [p for p in chosen if enabled and isinstance(p, Split)]
    marked = [p for p in chosen if enabled and isinstance(p, Split | DTensor)]
    with gathered(splits, modifier_rank), _available(marked):
        parted = [p for p in chosen if enabled and isinstance(p, DTensor)]
        whole = [nn.Parameter(fsdp.whole(p).detach(), p.requires_grad) for p in parted]
        for p, full in zip(parted, whole, strict=True):
            full.__dict__.update({k: v for k, v in vars(p).items() if k.startswith("ds_")})
            _show(p, full)
        checked = [] if modifier_rank is not None else [*splits, *whole]
        try:
            with _unchanged(checked, marked), _Whole(parted, whole):
                yield
        finally:
            for p in parted:
                _show(p, p)
        if modifier_rank is not None:
            for p, full in zip(parted, whole, strict=True):
                _adopt(p, full.detach(), modifier_rank)
            for engine in {p.glm_core_place[0] for p in parted}:  # type: ignore[attr-defined]  # the engine set it
                engine.adopt_weights()


@contextmanager
def unwrap_model_for_generation(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the model with whole parameters, for the block."""
    with GatheredParameters(model.parameters()):
        yield model


@contextmanager
def _unchanged(shown: Sequence[Tensor], params: Sequence[Tensor]) -> Iterator[None]:
    """Raises LostChange on every rank if one of them changes a tensor of `shown` in the block and
    the config asks for it."""
    if not any(getattr(t, "ds_enable_sanity_checks", False) for t in shown):
        yield
        return

    def versions() -> list[tuple[int, int]]:
        return [(t._version, 0 if isinstance(t, Split) else t.data_ptr()) for t in shown]

    before = versions()
    yield
    first: Any = params[0]
    group = first.device_mesh.get_group() if isinstance(first, DTensor) else first.group
    changed = torch.tensor(int(versions() != before), device=real_accelerator.device())
    dist.all_reduce(changed, dist.ReduceOp.MAX, group)
    if changed:
        raise LostChange(
            "zero.GatheredParameters: in-place modification without modifier_rank, which no rank "
            "keeps; pass modifier_rank=0"
        )


class _Whole(TorchFunctionMode):
    """Gives torch's functions a whole parameter for each DTensor that they are called with."""

    def __init__(self, parted: Sequence[Tensor], whole: Sequence[Tensor]) -> None:
        super().__init__()
        self.whole = {id(p): full for p, full in zip(parted, whole, strict=True)}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function != _GRADIENT:  # it stays the shards'
            args, kwargs = tree_map(lambda x: self.whole.get(id(x), x), (args, kwargs or {}))
        return function(*args, **(kwargs or {}))


_GRADIENT: Any = getattr(Tensor, "grad").__get__  # noqa: B009  # typed as a value, it is a property


def _show(param: Tensor, value: Tensor) -> None:
    """Puts `value` in the place of `param` wherever it is an attribute of the module."""
    engine, param_name = param.glm_core_place  # type: ignore[attr-defined]  # the engine set it
    for name, shared_name in engine.aliases.items():
        if shared_name == param_name:
            owner, _, leaf = name.rpartition(".")
            engine.module.get_submodule(owner)._parameters[leaf] = value


@torch.no_grad()
def _adopt(param: Tensor, values: Tensor, rank: int) -> None:
    """Sets a DTensor's shards from a rank's whole values."""
    assert isinstance(param, DTensor)
    dist.broadcast(values, rank)
    shard = distribute_tensor(values, param.device_mesh, param.placements, src_data_rank=None)
    param.to_local().copy_(shard.to_local())


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Has no effect. A parameter that is used outside its module must not belong to a layer of a
    ModuleList, since those are gathered one layer at a time."""
    say_once("zero.register_external_parameter has no effect: whole layers are gathered")


unregister_external_parameter = register_external_parameter
