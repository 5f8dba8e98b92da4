"""The engine that `initialize` returns: DeepSpeed's calls over one nn.Module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from glm_core.deepspeed import accelerator, checkpoint, monitor, schedules
from glm_core.deepspeed.answers import Answers
from glm_core.deepspeed.foreign import Saved
from glm_core.deepspeed.ops import named
from glm_core.deepspeed.settings import Settings, say_once
from glm_core.distributed.norm import Piece, clip_, global_norm
from glm_core.distributed.placement import Flat, Holder, Parted, Replicas
from glm_core.distributed.precision import cast_, to_compute
from glm_core.distributed.split import Split, join_module, move_, round_
from glm_core.distributed.zero import defer, shard_parameters
from glm_core.errors import ConfigError, TrainingError


class DeepSpeedEngine(Answers, nn.Module):
    """One data-parallel replica's share of training `module`. `backward(loss)`, then `step()`, per
    micro-batch; the update happens at the last of `gradient_accumulation_steps`."""

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
        """optimizer, lr_scheduler: made ones, or what makes one of parameters / of the optimizer;
        None: those of the settings, if any. Raises ConfigError."""
        super().__init__()
        self.module, self.settings, self.mpu = module, settings, mpu
        self.device = accelerator.device()
        self.dp_group: dist.ProcessGroup = (
            _world() if mpu is None else mpu.get_data_parallel_group()
        )
        self.dp_world_size = dist.get_world_size(self.dp_group)
        self._moved = {} if settings.stage == 3 else join_module(module)
        move_(module, self.device)
        self._same_start()
        if settings.precision.low:
            # stage 3 keeps float32 shards, which start, as all masters, from 16-bit weights
            (cast_ if settings.stage < 3 else round_)(module, settings.precision.compute)
        self.scaler = settings.loss_scale()
        self.holders: list[Holder] = []
        self.optimizer = self._configure(optimizer, model_parameters)
        self.names = {p: n for n, p in module.named_parameters()}
        self.aliases = {
            n: self.names[p] for n, p in module.named_parameters(remove_duplicate=False)
        }
        self.sizes = {p: p.numel() for p in self.names}
        self.lr_scheduler = self._schedule(lr_scheduler)
        self.global_steps = self.global_samples = self.micro_steps = self.skipped_steps = 0
        self.training_dataloader: Any = None
        self.monitor = monitor.Monitor(settings.raw)
        self.clock = monitor.Clock(enabled=bool(settings.raw.get("wall_clock_breakdown")))
        self.flops_profiler = monitor.FlopsProfiler(settings.raw.get("flops_profiler", {}))
        self._norm: float | None = None
        self._boundary: bool | None = None
        self._reduced = self._quiet = False
        self._applied = False
        for name, p in module.named_parameters():
            p.glm_core_place = (self, name)  # type: ignore[attr-defined]  # for safe_get_full_*

    @torch.no_grad()
    def _same_start(self) -> None:
        """Weights and buffers of the group's first rank for all of it."""
        if self.dp_world_size > 1:
            first = dist.get_global_rank(self.dp_group, 0)
            for t in (*self.module.parameters(), *self.module.buffers()):
                if not isinstance(t, Split):  # these are the first rank's already
                    dist.broadcast(t.detach(), first, self.dp_group)

    def _configure(self, optimizer: Any, parameters: Any) -> torch.optim.Optimizer | None:
        s = self.settings
        moved = self._moved
        if parameters is None:
            parameters = [p for p in self.module.parameters() if p.requires_grad]
        parameters = [moved.get(p, p) if isinstance(p, nn.Parameter) else p for p in parameters]
        if optimizer is None and s.optimizer is not None:
            optimizer = named.make(*s.optimizer, parameters)
        elif callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer):
            optimizer = optimizer(parameters)
        if s.stage == 3:
            mesh = DeviceMesh.from_group(self.dp_group, self.device.type)
            moved = shard_parameters(
                self.module, mesh, divide=self._divide(), precision=s.precision
            )
        if optimizer is None:
            return None
        named.check_stage(optimizer, s.stage, low=s.precision.low)
        if optimizer.state:
            raise ConfigError("optimizer: has a state already; give it to initialize before a step")
        for group in optimizer.param_groups:
            own = [moved.get(p, p) for p in group["params"] if p.requires_grad]
            if own:
                self.holders.append(self._holder(own))
                group["params"] = self.holders[-1].masters
        optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
        made: torch.optim.Optimizer = optimizer
        return made

    def _divide(self) -> float:
        return float(self.dp_world_size) if self.settings.divide_by_ranks else 1.0

    def _holder(self, params: list[nn.Parameter]) -> Holder:
        s, divide = self.settings, self._divide()
        if s.stage == 3:
            return Parted(params, self.dp_world_size)
        if s.stage == 0 and not s.precision.low:
            return Replicas(
                params, self.dp_group, divide=divide, predivide=s.predivide, bucket=s.bucket
            )
        return Flat(
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
                raise ConfigError("scheduler: there is no optimizer for it; add one")
            return schedules.make(*self.settings.scheduler, self.optimizer)
        made = hasattr(scheduler, "step") or not callable(scheduler)
        return scheduler if made else scheduler(self.optimizer)

    # --- the loop ---

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        if self.settings.auto_cast:
            dtype = self.settings.precision.compute
            inputs, kwargs = to_compute(inputs, dtype), to_compute(kwargs, dtype)
        if self.settings.stage == 3 and torch.is_grad_enabled():
            defer(self.module, self._quiet)
        with self.clock("forward"), self.flops_profiler(self.global_steps):
            return self.module(*inputs, **kwargs)

    def backward(
        self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> Tensor:
        """Gradients of one micro-batch, the loss divided by the accumulation steps; that loss."""
        self._needs_optimizer("backward")
        if loss.numel() != 1:
            raise TrainingError(f"backward: a loss of shape {tuple(loss.shape)}; reduce it first")
        scaled = loss / self.settings.accumulation if scale_wrt_gas else loss
        with self.clock("backward"):
            (scaled.float() * self.scaler.scale).backward(retain_graph=retain_graph)
            self._backward_done()
        return scaled

    def _backward_done(self) -> None:
        if self._quiet:
            return
        last = self.is_gradient_accumulation_boundary()
        for holder in self.holders:
            holder.backward_done(last)
        self._reduced = True

    def _needs_optimizer(self, call: str) -> None:
        if self.optimizer is None:
            raise ConfigError(f"engine.{call}: no optimizer; give one to initialize")

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Ends a micro-batch; at the accumulation's end clips, updates and advances the schedule.
        A step whose gradients are not finite is skipped in fp16 and bf16."""
        self._needs_optimizer("step")
        if self._quiet:
            raise TrainingError("engine.step inside no_sync; call it after the block")
        if not self._reduced:
            raise TrainingError(
                "engine.step: no engine.backward before it; call engine.backward(loss), which "
                "reduces gradients, in place of loss.backward()"
            )
        self._reduced = self._applied = False
        if self.is_gradient_accumulation_boundary():
            with self.clock("step"):
                self._update(lr_kwargs or {})
            monitor.tell(self)
        self.micro_steps += 1

    @torch.no_grad()
    def _update(self, lr_kwargs: dict[str, Any]) -> None:
        assert self.optimizer is not None
        parts = self._pieces()
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
            for holder in self.holders:
                holder.publish()
            self._applied = True
        self.scaler.update(overflow)
        self.zero_grad()
        if not overflow and self.lr_scheduler is not None:
            self.lr_scheduler.step(**lr_kwargs)
        self.global_steps += 1
        self.global_samples += self.settings.train_batch

    def _pieces(self) -> list[Piece]:
        return [piece for h in self.holders for piece in h.pieces(self._copies)]

    def _copies(self, param: nn.Parameter) -> int:
        """Ranks of the whole job with the same elements."""
        return self.dp_world_size if is_split(param) else dist.get_world_size()

    def _sum_norm(self, parts: list[Piece]) -> Tensor:
        return global_norm(parts, device=str(self.device))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets all gradients."""
        for holder in self.holders:
            holder.zero_grad()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside only accumulate on this rank; the next one outside reduces the sum."""
        self._hold(True)
        try:
            yield
        finally:
            self._hold(False)

    def _hold(self, quiet: bool) -> None:
        self._quiet = quiet
        for holder in self.holders:
            holder.enabled = not quiet

    def is_gradient_accumulation_boundary(self) -> bool:
        """Does this micro-batch end with an update?"""
        if self._boundary is not None:
            return self._boundary
        return (self.micro_steps + 1) % self.settings.accumulation == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """The caller's word instead of the count, from now on."""
        self._boundary = is_boundary

    def __getattr__(self, name: str) -> Any:
        """What the engine has not, the module may have, as in DeepSpeed."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None or not hasattr(module, name):
                raise
            return getattr(module, name)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile of the module in place; DeepSpeed's compile_kwargs are torch's."""
        self.module.compile(*args, **kwargs)

    def destroy(self) -> None:
        """Nothing is held that the collector does not free."""

    # --- checkpoints: glm_core.deepspeed.checkpoint decides ---

    num_stages = 1
    """of a pipeline"""

    def read_checkpoint(self, place: Path) -> Saved:
        """What `load_checkpoint` loads. Raises CheckpointError."""
        return checkpoint.read(place, checkpoint.mp_rank(self), list(self.names.values()))

    def module_state_dict(self) -> dict[str, Any]:
        """The module's weights as they are on this rank (stage 3: DTensors)."""
        return self.module.state_dict()

    def load_module_state_dict(
        self,
        state_dict: dict[str, Any],
        strict: bool = True,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> None:
        """Weights, and from them the masters."""
        if custom_load_fn is not None:
            custom_load_fn(src=state_dict, dst=self.module)
        else:
            self.module.load_state_dict(state_dict, strict=strict)
        for holder in self.holders:
            holder.adopt()

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Everything a resumed run needs, into save_dir/tag (tag None: global_stepN), on all ranks;
        `latest` names it. Raises CheckpointError."""
        if exclude_frozen_parameters:
            say_once("exclude_frozen_parameters has no effect: frozen parameters are saved too")
        checkpoint.save(self, save_dir, tag, client_state or {}, save_latest)
        return True

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
        """Ours, from any stage and number of ranks, or DeepSpeed's own; its path and client state.
        (None, {}) where `latest` does not exist. Raises CheckpointError."""
        return checkpoint.load(
            self,
            load_dir,
            tag,
            strict=load_module_strict,
            optimizer=load_optimizer_states and not load_module_only,
            scheduler=load_lr_scheduler_states and not load_module_only,
            only_module=load_module_only,
            custom=custom_load_fn,
        )

    def save_16bit_model(
        self,
        save_dir: str,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """The whole module's weights in the working dtype as one file, written by rank 0. False,
        and nothing is written, in stage 3 unless the config says to gather on saving."""
        if self.settings.stage == 3 and not self.settings.gather_on_save:
            say_once(
                "save_16bit_model: nothing saved; set "
                "zero_optimization.stage3_gather_16bit_weights_on_model_save"
            )
            return False
        checkpoint.save_weights(self, save_dir, save_filename)
        return True

    save_fp16_model = save_16bit_model


def is_split(param: nn.Parameter) -> bool:
    """Is it a tensor-parallel rank's part? Megatron marks what it splits."""
    marks = ("model_parallel", "tensor_model_parallel")
    return any(getattr(param, mark, False) for mark in marks)


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world
