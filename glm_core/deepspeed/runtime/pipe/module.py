"""Cuts a list of layers into stages and builds this process's own; ties the weights that layers of
several stages share."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from glm_core.deepspeed import comm
from glm_core.deepspeed.accelerator.real_accelerator import device
from glm_core.deepspeed.runtime.activation_checkpointing import checkpointing
from glm_core.deepspeed.runtime.pipe import partition
from glm_core.deepspeed.runtime.pipe.topology import (
    PipeDataParallelTopology,
    PipelineParallelGrid,
    ProcessTopology,
    make_groups,
)
from glm_core.deepspeed.runtime.utils import set_random_seed
from glm_core.errors import ConfigError, TrainingError


class PipelineError(TrainingError):
    """A call that a pipeline does not offer."""


class LayerSpec:
    """A layer that is not built yet: its class and arguments."""

    def __init__(self, typename: type[nn.Module], *module_args: Any, **module_kwargs: Any) -> None:
        if not (isinstance(typename, type) and issubclass(typename, nn.Module)):
            raise ConfigError(f"LayerSpec: {typename!r} is not a class of nn.Module; pass one")
        self.typename, self.module_args, self.module_kwargs = typename, module_args, module_kwargs

    def __repr__(self) -> str:
        arguments = [repr(a) for a in self.module_args]
        arguments += [f"{k}={v!r}" for k, v in self.module_kwargs.items()]
        return f"{self.typename.__name__}({', '.join(arguments)})"

    def build(self, log: bool = False) -> nn.Module:
        """Builds a new layer."""
        return self.typename(*self.module_args, **self.module_kwargs)


class TiedLayerSpec(LayerSpec):
    """A layer that a stage builds once for all specs of the same key. Its weights named by
    `tied_weight_attr` are the same on all stages. If given, forward_fn(layer, inputs) is called in
    place of the layer."""

    def __init__(
        self,
        key: str,
        typename: type[nn.Module],
        *module_args: Any,
        forward_fn: Callable[[Any, Any], Any] | None = None,
        tied_weight_attr: str | list[str] = ["weight"],  # noqa: B006  # never changed
        **module_kwargs: Any,
    ) -> None:
        super().__init__(typename, *module_args, **module_kwargs)
        self.key, self.forward_fn = key, forward_fn
        self.tied_weight_attr = (
            [tied_weight_attr] if isinstance(tied_weight_attr, str) else list(tied_weight_attr)
        )


class Tie(NamedTuple):
    """A weight that several stages hold."""

    weight: nn.Parameter
    ranks: list[int]
    """the ranks of this replica that hold it, one per stage"""
    group: dist.ProcessGroup


class PipelineModule(nn.Module):
    """Runs `layers` one after the other. Each is a LayerSpec, a module or a function of the
    previous layer's output, and this process builds those of its stage. Parameters are named by the
    layer's number in the whole model, tied ones by their key."""

    def __init__(
        self,
        layers: Iterable[Any],
        num_stages: int | None = None,
        topology: ProcessTopology | None = None,
        loss_fn: Callable[..., Any] | None = None,
        seed_layers: bool = False,
        seed_fn: Callable[[int], Any] | None = None,
        base_seed: int = 1234,
        partition_method: str = "parameters",
        activation_checkpoint_interval: int = 0,
        activation_checkpoint_func: Callable[..., Any] = checkpointing.checkpoint,
        checkpointable_layers: list[str] | None = None,
        dynamic_shape: bool = False,
    ) -> None:
        """partition_method decides what is balanced over stages: `parameters` (trainable ones),
        `uniform` (layers), `type:REGEX` (layers whose class name matches).
        activation_checkpoint_interval: how many layers are recomputed together, 0 for none.
        dynamic_shape: micro-batches of a batch may differ in shape. Raises ConfigError."""
        super().__init__()
        comm.init_distributed()
        self._topo = topology if topology is not None else _topology(num_stages)
        self.num_stages = self._topo.get_dim("pipe")
        if self.num_stages < 1:
            raise ConfigError(f"topology: no axis of {self._topo.axes} is named pipe; name one so")
        self._grid = PipelineParallelGrid(self._topo)
        self.global_rank, self.stage_id = dist.get_rank(), self._grid.get_stage_id()
        self.loss_fn, self.dynamic_shape = loss_fn, dynamic_shape
        self.seed_layers, self.base_seed = seed_layers, base_seed
        self.seed_fn: Callable[[int], Any] = seed_fn or set_random_seed
        self.activation_checkpoint_interval = activation_checkpoint_interval
        self.activation_checkpoint_func = activation_checkpoint_func
        self.checkpointable_layers = checkpointable_layers
        self.micro_offset = 0
        self._layer_specs = list(layers)
        self.parts = self._partition(partition_method)
        self._local_start, self._local_stop = self.parts[self.stage_id : self.stage_id + 2]
        self.forward_funcs: list[Callable[[Any], Any]] = []
        self.tied_modules = nn.ModuleDict()
        self._build()
        self.to(device())
        self.ties = self._find_ties()
        self._synchronize_tied_weights()

    # --- which layers ---

    def _partition(self, method: str) -> list[int]:
        method, count = method.lower(), len(self._layer_specs)
        if method == "uniform":
            return partition.uniform(count, self.num_stages)
        if method == "parameters":
            return partition.balanced(self._count_layer_params(), self.num_stages)
        if method.startswith("type:"):
            chosen = self._find_layer_type(method.removeprefix("type:"))
            return partition.balanced([int(i in chosen) for i in range(count)], self.num_stages)
        raise ConfigError(
            f"partition_method={method!r}: use parameters, uniform or type:REGEX (DeepSpeed has no "
            "profile either)"
        )

    def _count_layer_params(self) -> list[int]:
        """Returns the trainable elements of each layer. Specs are built for it, which draws from
        the random generators as it does in DeepSpeed: the same seed then makes the same weights."""
        counts = []
        for layer in self._layer_specs:
            if isinstance(layer, LayerSpec):
                layer = layer.build()
            own = layer.parameters() if isinstance(layer, nn.Module) else ()
            counts.append(sum(p.numel() for p in own if p.requires_grad))
        return counts

    def _find_layer_type(self, pattern: str) -> set[int]:
        wanted = re.compile(pattern, re.IGNORECASE)
        matching = {i for i, s in enumerate(self._layer_specs) if wanted.search(layer_name(s))}
        if not matching:
            names = sorted({layer_name(s) for s in self._layer_specs})
            raise ConfigError(
                f"partition_method: no layer's class matches {pattern!r}; there are: "
                f"{', '.join(names)}"
            )
        return matching

    def _build(self) -> None:
        for index in range(self._local_start, self._local_stop):
            if self.seed_layers:
                self.seed_fn(self.base_seed + index)
            self.forward_funcs.append(self._layer(index, self._layer_specs[index]))

    def _layer(self, index: int, spec: Any) -> Callable[[Any], Any]:
        if isinstance(spec, PipelineModule):
            raise ConfigError(f"layer {index}: is a PipelineModule itself; list its layers")
        if isinstance(spec, TiedLayerSpec):
            if spec.key not in self.tied_modules:
                self.tied_modules[spec.key] = spec.build()
            tied = self.tied_modules[spec.key]
            return tied if spec.forward_fn is None else functools.partial(spec.forward_fn, tied)
        layer = spec.build() if isinstance(spec, LayerSpec) else spec
        if isinstance(layer, nn.Module):
            self.add_module(str(index), layer)
        elif not callable(layer):
            raise ConfigError(
                f"layer {index}: {layer!r} is not a module, spec or function; pass one"
            )
        called: Callable[[Any], Any] = layer
        return called

    # --- weights of several stages ---

    def _find_ties(self) -> list[Tie]:
        """Returns this process's ties. All ranks call this: they make the process groups
        together."""
        ties = []
        specs = {s.key: s for s in reversed(self._layer_specs) if isinstance(s, TiedLayerSpec)}
        for key in sorted(specs):
            stages = self.stages_of(key)
            if len(stages) == 1:
                continue
            lines = [[line[s] for s in stages] for line in self._topo.get_axis_comm_lists("pipe")]
            ranks, group = make_groups(lines)
            if key in self.tied_modules:
                weight = operator.attrgetter(*specs[key].tied_weight_attr)(self.tied_modules[key])
                each = weight if isinstance(weight, tuple) else (weight,)
                ties += [Tie(w, ranks, group) for w in each]
        return ties

    def stages_of(self, key: str) -> list[int]:
        """Returns the stages that have a layer of this key."""
        layers = [
            i
            for i, s in enumerate(self._layer_specs)
            if isinstance(s, TiedLayerSpec) and s.key == key
        ]
        return sorted({self.stage_owner(i) for i in layers})

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        """Gives all stages of a tie the first stage's weight."""
        for tie in self.ties:
            dist.broadcast(tie.weight.detach(), tie.ranks[0], tie.group)

    # --- accessors ---

    def stage_owner(self, layer_idx: int) -> int:
        """Returns the stage that holds a layer. Raises ConfigError."""
        for stage in range(self.num_stages):
            if self.parts[stage] <= layer_idx < self.parts[stage + 1]:
                return stage
        raise ConfigError(f"layer {layer_idx}: there are only {len(self._layer_specs)} layers")

    def prefix(self, layer_idx: int) -> str:
        """Returns the prefix of the names of a layer's parameters."""
        spec = self._layer_specs[layer_idx]
        tied = isinstance(spec, TiedLayerSpec)
        return f"tied_modules.{spec.key}." if tied else f"{layer_idx}."

    def names_a_layer(self, name: str) -> bool:
        """Is this the name of a weight of some layer, on any stage?"""
        return any(name.startswith(self.prefix(i)) for i in range(len(self._layer_specs)))

    def partitions(self) -> list[int]:
        """Returns the stages' boundaries: stage i holds layers [parts[i], parts[i + 1])."""
        return self.parts

    def topology(self) -> ProcessTopology:
        return self._topo

    def mpu(self) -> PipelineParallelGrid:
        """Returns the grid: this process's place and process groups."""
        return self._grid

    def num_pipeline_stages(self) -> int:
        return self.num_stages

    def set_checkpoint_interval(self, interval: int) -> None:
        """Sets how many layers are recomputed together; 0 for none."""
        if interval < 0:
            raise ConfigError(f"activation_checkpoint_interval={interval}: must be 0 or more")
        self.activation_checkpoint_interval = interval

    def get_additional_losses(self) -> dict[str, Any] | None:
        """Returns further losses, whose means the engine reports; a subclass may override it."""
        return None

    # --- the stage's forward ---

    def forward(self, forward_input: Any) -> Any:
        """Runs this stage's layers over what the previous stage sent."""
        self.micro_offset += 1
        count, x = len(self.forward_funcs), forward_input
        for start in range(0, count, self.activation_checkpoint_interval or max(count, 1)):
            stop = min(start + (self.activation_checkpoint_interval or count), count)
            run = self._run(start, stop, self.micro_offset + 1)
            if self.activation_checkpoint_interval and self._is_checkpointable(start, stop):
                inputs = x if isinstance(x, tuple) else (x,)
                x = self.activation_checkpoint_func(run, *inputs)
            else:
                x = run(x)
        return x

    def _run(self, start: int, stop: int, offset: int) -> Callable[..., Any]:
        """Returns a function that runs layers [start, stop) of the stage. offset: the
        micro-batch's, for its seeds."""

        def run(*inputs: Any) -> Any:
            x = inputs[0] if len(inputs) == 1 else inputs
            for index in range(start, stop):
                if self.seed_layers:
                    self.seed_fn(self.base_seed * offset + self._local_start + index)
                x = self.forward_funcs[index](x)
            return x

        return run

    def _is_checkpointable(self, start: int, stop: int) -> bool:
        """Are all layers of `checkpointable_layers`' classes? Without such a list: does any have
        parameters?"""
        layers = self.forward_funcs[start:stop]
        if self.checkpointable_layers is not None:
            return all(type(f).__name__ in self.checkpointable_layers for f in layers)
        return any(isinstance(f, nn.Module) and any(True for _ in f.parameters()) for f in layers)


def _topology(num_stages: int | None) -> ProcessTopology:
    """Returns the topology that spreads all ranks over so many stages."""
    if num_stages is None:
        raise ConfigError("PipelineModule: neither num_stages nor topology is given; give one")
    ranks = dist.get_world_size()
    if num_stages < 1 or ranks % num_stages:
        raise ConfigError(f"num_stages={num_stages}: must divide the {ranks} ranks of the job")
    return PipeDataParallelTopology(num_stages, ranks // num_stages)


def layer_name(spec: Any) -> str:
    """Returns the name of a layer's or spec's class, or of a function."""
    if isinstance(spec, LayerSpec):
        return spec.typename.__name__
    return type(spec).__name__ if isinstance(spec, nn.Module) else getattr(spec, "__name__", "")
