"""Trains an nn.Module by DeepSpeed's calls: the engine that `initialize` returns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from glm_core.deepspeed.accelerator import real_accelerator
from glm_core.deepspeed.checkpoint import layouts, own_layout
from glm_core.deepspeed.checkpoint.content import COUNTERS, Content
from glm_core.deepspeed.checkpoint.files import model_file
from glm_core.deepspeed.checkpoint.training_state import OptimizerShard, whole_weights
from glm_core.deepspeed.monitor.monitor import Monitor, Progress
from glm_core.deepspeed.notices import say_once
from glm_core.deepspeed.ops import from_config
from glm_core.deepspeed.ops.adam import FusedAdam
from glm_core.deepspeed.profiling.flops_profiler import ForwardFlops
from glm_core.deepspeed.runtime import lr_schedules
from glm_core.deepspeed.runtime.accessors import Accessors
from glm_core.deepspeed.runtime.reduction import Reduction
from glm_core.deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from glm_core.deepspeed.runtime.zero.partition_parameters import mark
from glm_core.deepspeed.settings import BadConfig, Settings
from glm_core.deepspeed.utils.timer import PhaseTimer
from glm_core.deepspeed.utils.z3_leaf_module import zero3_blocks
from glm_core.distributed.fsdp import shard_parameters
from glm_core.distributed.norm import GradientPart, clip_, global_norm
from glm_core.distributed.offload import HostStore, HostZero3Store
from glm_core.distributed.placement import FlatStore, MasterStore, ReplicaStore, Zero3Store
from glm_core.distributed.precision import cast_, cast_buffers_, to_compute
from glm_core.distributed.split import Split, broadcast_, join_module, move_, round_
from glm_core.errors import ConfigError, TrainingError


class DeepSpeedEngine(Accessors, Reduction, nn.Module):
    """Trains one data-parallel replica of `module`. Each micro-batch is a `backward(loss)` and a
    `step()`; the last of `gradient_accumulation_steps` of them updates the weights."""

    def __init__(
        self,
        module: nn.Module,
        settings: Settings,
        *,
        optimizer: Any = None,
        model_parameters: Any = None,
        lr_scheduler: Any = None,
        mpu: Any = None,
    ) -> None:
        """optimizer: a torch optimizer, or a function that makes one of parameters; lr_scheduler: a
        schedule, or a function that makes one of the optimizer. Where they are None the settings'
        own are made, if any. Raises ConfigError."""
        super().__init__()
        self.module, self.settings, self.mpu = module, settings, mpu
        self.device = real_accelerator.device()
        self.dp_group: dist.ProcessGroup = (
            _world() if mpu is None else mpu.get_data_parallel_group()
        )
        self.dp_world_size = dist.get_world_size(self.dp_group)
        if any(isinstance(p, DTensor) for p in module.parameters()):
            raise ConfigError("initialize: an engine has cut this model already; build a new one")
        self._joined = {} if settings.stage == 3 else join_module(module)
        if not settings.offload_param:  # a layer at a time: the device need not hold the model
            move_(module, self.device)
        self._broadcast_start()
        if settings.precision.low:
            # ZeRO 3 keeps float32 shards; like all masters they start from 16-bit weights
            (cast_ if settings.stage < 3 else round_)(module, settings.precision.compute)
        if settings.buffers is not None:
            cast_buffers_(module, settings.buffers)
        self.scaler = settings.loss_scale()
        self.stores: list[MasterStore] = []
        self.optimizer = self._configure(optimizer, model_parameters)
        self.names = {p: n for n, p in module.named_parameters()}
        # not the module's own method: THUDM/GLM's wrapper has one without this argument
        every = nn.Module.named_parameters(module, remove_duplicate=False)
        self.aliases = {path: self.names[p] for path, p in every}
        self.lr_scheduler = self._schedule(lr_scheduler)
        self.global_steps = self.global_samples = self.micro_steps = self.skipped_steps = 0
        self.training_dataloader: Any = None
        self.monitor = Monitor(settings.raw, settings.steps_per_print)
        self.timer = PhaseTimer(enabled=bool(settings.raw.get("wall_clock_breakdown")))
        self.flops_profiler = ForwardFlops(settings.raw.get("flops_profiler", {}))
        self._norm: float | None = None
        self._start_reduction()
        self._applied = False
        if settings.stage == 3:
            mark(module.parameters(), settings.sanity_checks)
        for name, p in module.named_parameters():
            p.glm_core_place = (self, name)  # type: ignore[attr-defined]  # for safe_get_full_*

    @torch.no_grad()
    def _broadcast_start(self) -> None:
        """Gives every rank of the data-parallel group the first rank's weights and buffers."""
        if self.dp_world_size > 1:
            first = dist.get_global_rank(self.dp_group, 0)
            for t in (*self.module.parameters(), *self.module.buffers()):
                if not isinstance(t, Split):  # these are the first rank's already
                    broadcast_(t.detach(), first, self.dp_group, self.device)

    def _configure(self, optimizer: Any, parameters: Any) -> torch.optim.Optimizer | None:
        """Makes the optimizer, and the store of each of its parameter groups."""
        s = self.settings
        renewed = self._joined
        if parameters is None:
            parameters = [p for p in self.module.parameters() if p.requires_grad]
        parameters = [renewed.get(p, p) if isinstance(p, nn.Parameter) else p for p in parameters]
        if optimizer is None and s.optimizer is not None:
            optimizer = from_config.make(*s.optimizer, parameters)
        elif callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer):
            optimizer = optimizer(parameters)
        if s.stage == 3:
            mesh = DeviceMesh.from_group(self.dp_group, self.device.type)
            renewed = shard_parameters(
                self.module,
                mesh,
                divide=self._divide(),
                precision=s.precision,
                blocks=zero3_blocks(self.module, DeepSpeedZeroLeafModuleConfig(**s.leaves)),
                merge_below=s.merge_below,
                on_host=s.offload_param,
                pin=s.pin_memory,
            )
        if optimizer is None:
            return None
        from_config.check_stage(optimizer, s.stage, low=s.precision.low, offload=s.offload)
        if optimizer.state:
            raise ConfigError("optimizer: has stepped already; initialize must get it before")
        for group in optimizer.param_groups:
            trainable = [renewed.get(p, p) for p in group["params"] if p.requires_grad]
            if trainable:
                self.stores.append(self._store(trainable))
                group["params"] = self.stores[-1].masters
        optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
        if isinstance(optimizer, FusedAdam):
            optimizer.on_host = s.offload
        configured: torch.optim.Optimizer = optimizer
        self._tell(configured, overflow=False)
        return configured

    def _tell(self, optimizer: Any, *, overflow: bool) -> None:
        """Sets what scripts read from DeepSpeed's optimizer, which is a wrapper of the real one."""
        optimizer.optimizer, optimizer.overflow = optimizer, overflow
        optimizer.cur_scale = optimizer.loss_scale = self.scaler.scale
        optimizer.refresh_fp32_params = self.adopt_weights

    def adopt_weights(self) -> None:
        """Sets the masters from the weights."""
        for store in self.stores:
            store.adopt()

    def _divide(self) -> float:
        return float(self.dp_world_size) if self.settings.divide_by_ranks else 1.0

    def _store(self, params: list[nn.Parameter]) -> MasterStore:
        s, divide = self.settings, self._divide()
        if s.stage == 3 and s.offload and not s.offload_param:
            return HostZero3Store(params, pin=s.pin_memory)
        if s.stage == 3:
            return Zero3Store(params)
        flat = functools.partial(HostStore, pin=s.pin_memory) if s.offload else FlatStore
        if s.stage == 0 and not s.precision.low and not s.offload:
            return ReplicaStore(
                params, self.dp_group, divide=divide, predivide=s.predivide, bucket=s.bucket
            )
        return flat(
            params,
            self.dp_group,
            stage=s.stage,
            divide=divide,
            precision=s.precision,
            predivide=s.predivide,
            bucket=s.bucket,
        )

    def _schedule(self, scheduler: Any) -> Any:
        if scheduler is None and self.settings.scheduler is not None:
            if self.optimizer is None:
                raise ConfigError("scheduler: there is no optimizer for it; add an optimizer")
            return lr_schedules.make(*self.settings.scheduler, self.optimizer)
        is_schedule = hasattr(scheduler, "step") or not callable(scheduler)
        return scheduler if is_schedule else scheduler(self.optimizer)

    def deepspeed_io(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Any = None,
        num_local_io_workers: int | None = None,
    ) -> DataLoader[Any]:
        """Returns a loader of this rank's part of the data set, shuffled by torch's
        DistributedSampler for the route `train`. batch_size: None means the config's rows of a
        micro-batch; pin_memory has no effect."""
        rank, ranks, shuffle = dist.get_rank(self.dp_group), self.dp_world_size, route == "train"
        sampler = data_sampler or DistributedSampler(dataset, ranks, rank, shuffle=shuffle)
        return DataLoader(
            dataset,
            batch_size or self.settings.micro_batch,
            sampler=sampler,
            collate_fn=collate_fn,
            drop_last=self.settings.drop_last,
            num_workers=num_local_io_workers or 0,
        )

    # --- the loop ---

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Runs the module's forward."""
        if self.settings.auto_cast:
            dtype = self.settings.precision.compute
            inputs, kwargs = to_compute(inputs, dtype), to_compute(kwargs, dtype)
        with self.timer("forward"), self.flops_profiler(self.global_steps):
            return self._watch(self.module(*inputs, **kwargs))

    def backward(
        self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> Tensor:
        """Computes the gradients of one micro-batch. Returns the loss divided by the accumulation
        steps (undivided without scale_wrt_gas), of which they are the gradients."""
        self._needs_optimizer("backward")
        if loss.numel() != 1:
            raise TrainingError(
                f"backward: the loss has shape {tuple(loss.shape)}; reduce it to a number"
            )
        scaled = loss / self.settings.accumulation if scale_wrt_gas else loss
        with self._calls_backward(), self.timer("backward"):
            (scaled.float() * self.scaler.scale).backward(retain_graph=retain_graph)
            self._backward_done()
        return scaled

    def _needs_optimizer(self, call: str) -> None:
        if self.optimizer is None:
            raise ConfigError(f"engine.{call}: there is no optimizer; give initialize one")

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Ends a micro-batch. At the accumulation's end it clips, updates the weights and advances
        the schedule; in fp16 and bf16 an update whose gradients are not finite is skipped."""
        self._needs_optimizer("step")
        self._applied = False
        if self._ends_accumulation():
            with self.timer("step"):
                self._update(lr_kwargs or {})
            self._report_progress()
        self._reduced = False
        self.micro_steps += 1

    @torch.no_grad()
    def _update(self, lr_kwargs: dict[str, Any]) -> None:
        assert self.optimizer is not None
        parts = self._gradient_parts()
        norm = self._sum_norm(parts) / self.scaler.scale
        overflow = self.settings.skip_overflow and not bool(torch.isfinite(norm))
        self._norm = float(norm)
        if overflow:
            self.skipped_steps += 1
        else:
            if self.scaler.scale != 1:
                for tensor, _ in parts:
                    tensor.div_(self.scaler.scale)
            clip_(parts, norm, self.settings.clip)
            self.optimizer.step()
            for store in self.stores:
                store.publish()
            self._applied = True
        self.scaler.update(overflow)
        self._tell(self.optimizer, overflow=overflow)
        self.zero_grad()
        if not overflow and self.lr_scheduler is not None:
            self.lr_scheduler.step(**lr_kwargs)
        self.global_steps += 1
        micro = self.settings.train_batch // self.settings.accumulation
        counted = self.settings.accumulation if self.settings.managed else self._backwards
        self.global_samples += micro * counted
        self._backwards = 0

    def _gradient_parts(self) -> list[GradientPart]:
        return [part for store in self.stores for part in store.gradient_parts(self._copies)]

    def _copies(self, param: nn.Parameter) -> int:
        """Returns on how many ranks of the whole job the same elements are."""
        return self.dp_world_size if is_split(param) else dist.get_world_size()

    def _sum_norm(self, parts: list[GradientPart]) -> Tensor:
        return global_norm(parts, device=str(self.device))

    def _report_progress(self) -> None:
        progress = Progress(
            updates=self.global_steps,
            skipped=self.skipped_steps,
            samples=self.global_samples,
            rates=self.get_lr(),
            loss_scale=self.scaler.scale if self.fp16_enabled() else None,
            phase_ms=self.timer.take(),
        )
        self.monitor.report(progress)
        self.flops_profiler.report()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discards all gradients."""
        for store in self.stores:
            store.zero_grad()

    def __getattr__(self, name: str) -> Any:
        """Returns the module's attribute where the engine has none, as DeepSpeed does."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None or not hasattr(module, name):
                raise
            return getattr(module, name)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the module in place with torch.compile; DeepSpeed's compile_kwargs are
        torch's."""
        self.module.compile(*args, **kwargs)

    def destroy(self) -> None:
        """Does nothing: Python frees all that the engine holds."""

    # --- checkpoints ---

    num_stages = 1
    """pipeline stages, for PipelineEngine"""

    def read_checkpoint(self, place: Path) -> Content:
        """Reads the content that `load_checkpoint` loads. Raises CheckpointError."""
        return layouts.read(place, self.get_model_parallel_rank(), list(self.names.values()))

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any]:
        """Returns the module's weights as they are on this rank (ZeRO 3: DTensors)."""
        frozen = self._frozen() if exclude_frozen_parameters else set()
        return {n: w for n, w in self.module.state_dict().items() if n not in frozen}

    def _frozen(self) -> set[str]:
        frozen = {n for p, n in self.names.items() if not p.requires_grad}
        return {n for pair in self.aliases.items() for n in pair if pair[1] in frozen}

    def load_module_state_dict(
        self,
        state_dict: dict[str, Any],
        strict: bool = True,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> None:
        """Sets the weights, and from them the masters."""
        if custom_load_fn is not None:
            custom_load_fn(src=state_dict, dst=self.module)
        else:
            self.module.load_state_dict(state_dict, strict=strict)
        self.adopt_weights()

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Saves everything a resumed run needs into save_dir/tag (tag None: global_stepN) and makes
        `latest` name it. Call it on all ranks. Such a checkpoint without the frozen parameters is
        loaded with load_module_strict=False. Raises CheckpointError on every rank if any could
        not write."""
        if not save_dir:
            raise BadConfig(f"engine.save_checkpoint: save_dir is {save_dir!r}; give a folder")
        tag = tag or f"global_step{self.global_steps}"
        own_layout.check_tag(tag, self.settings.tag_validation)
        model = self._model_file(client_state or {}, exclude_frozen_parameters)
        shard = self._optimizer_shard()
        rank_file: own_layout.RankFile = {
            "format": own_layout.FORMAT,
            "mp_rank": self.get_model_parallel_rank(),
            "pieces": shard.spans(),
            "groups": shard.groups(),
        }
        writes_model = dist.get_rank(self.dp_group) == 0
        own_layout.write(
            Path(save_dir), tag, rank_file, model if writes_model else None, latest=save_latest
        )
        return True

    def _model_file(self, client: dict[str, Any], exclude_frozen: bool = False) -> dict[str, Any]:
        schedule = self.lr_scheduler
        return own_layout.model_contents(
            self._whole_weights(exclude_frozen),
            lr_scheduler=schedule.state_dict() if hasattr(schedule, "state_dict") else None,
            loss_scale=self.scaler.state(),
            slice_rank=_slice_rank(self.mpu),
            stages=self.num_stages,
            counters={name: getattr(self, name) for name in COUNTERS},
            client=client,
        )

    def _create_checkpoint_file(self, save_dir: str, tag: str, zero_checkpoint: bool) -> str:
        """Makes the folder of a checkpoint and returns the path of this rank's weights in it.
        SwissArmyTransformer saves by this and `_save_checkpoint`."""
        path = Path(save_dir) / tag / model_file(self.get_model_parallel_rank())
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)

    def _save_checkpoint(
        self, save_dir: str, tag: str, client_state: dict[str, Any] | None = None
    ) -> None:
        """Writes this rank's weights without the optimizer; no collective in ZeRO 0 to 2."""
        path = self._create_checkpoint_file(save_dir, tag, False)
        torch.save(self._model_file(client_state or {}), path)

    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any]]:
        """Loads a checkpoint of ours, from any ZeRO stage and number of ranks, or of DeepSpeed's.
        Returns its path and client state; (None, {}) where `latest` does not exist. Raises
        CheckpointError."""
        place = layouts.find(Path(load_dir), tag, universal=self.settings.load_universal)
        if place is None:
            return None, {}
        content = self.read_checkpoint(place)
        self._set_weights(content.module, load_module_strict, custom_load_fn)
        if not load_module_only:
            self._optimizer_shard().restore(
                content.state if self.settings.load_masters else {},
                content.groups if load_optimizer_states else None,
            )
            if load_optimizer_states and content.loss_scale:
                self._restore_loss_scale(content.loss_scale)
                self._tell(self.optimizer, overflow=False)
            for name, value in content.counters.items():
                setattr(self, name, value)
            schedule = content.lr_scheduler if load_lr_scheduler_states else None
            if schedule is not None and self.lr_scheduler is not None:
                self.lr_scheduler.load_state_dict(schedule)
        return str(place), content.client

    def save_16bit_model(
        self,
        save_dir: str,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Writes the whole module's weights in the working dtype as one file, on rank 0. In ZeRO 3
        it writes nothing and returns False unless the config asks for gathering on saving."""
        if self.settings.stage == 3 and not self.zero_gather_16bit_weights_on_model_save():
            say_once(
                "save_16bit_model: nothing saved; set "
                "zero_optimization.stage3_gather_16bit_weights_on_model_save"
            )
            return False
        weights = self._whole_weights(exclude_frozen_parameters)
        if dist.get_rank() == 0:
            Path(save_dir).mkdir(parents=True, exist_ok=True)
            torch.save(weights, Path(save_dir) / save_filename)
        dist.barrier()
        return True

    save_fp16_model = save_16bit_model

    def _zero3_consolidated_16bit_state_dict(
        self, exclude_frozen_parameters: bool = False
    ) -> dict[str, Any] | None:
        """Returns the whole weights on rank 0, None elsewhere. Accelerate calls it."""
        weights = self._whole_weights(exclude_frozen_parameters)
        return weights if dist.get_rank() == 0 else None

    def _whole_weights(self, exclude_frozen: bool = False) -> dict[str, Any]:
        # ZeRO 3's weights are the float32 masters; they are saved in the working dtype
        s = self.settings
        weights = whole_weights(self.module, s.precision.compute if s.stage == 3 else None)
        frozen = self._frozen() if exclude_frozen else set()
        return {n: w for n, w in weights.items() if n not in frozen}

    def _set_weights(
        self, weights: dict[str, Tensor], strict: bool, custom: Callable[..., Any] | None
    ) -> None:
        if self.settings.stage == 3 and custom is None:
            self._optimizer_shard().set_zero3_weights(self.module, weights, strict=strict)
            self.adopt_weights()
        else:
            self.load_module_state_dict(weights, strict, custom)

    def _restore_loss_scale(self, state: dict[str, Any]) -> None:
        # where one of the two is fixed, the settings decide how the scale changes from here on
        both_dynamic = self.scaler.dynamic and state.get("window", 0) > 0
        self.scaler.restore(state if both_dynamic else {"scale": state["scale"]})

    def _optimizer_shard(self) -> OptimizerShard:
        return OptimizerShard(self.stores, self.optimizer, self.names)


def is_split(param: nn.Parameter) -> bool:
    """Is the parameter a tensor-parallel rank's part? Megatron marks those that it splits."""
    marks = ("model_parallel", "tensor_model_parallel")
    return any(getattr(param, mark, False) for mark in marks)


def _slice_rank(mpu: Any) -> int:
    """Returns the tensor-parallel rank; an mpu that names none has no pipeline, so its
    model-parallel rank is the same."""
    if mpu is None:
        return 0
    return int(getattr(mpu, "get_slice_parallel_rank", mpu.get_model_parallel_rank)())


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world
