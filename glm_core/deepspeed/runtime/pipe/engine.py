"""The engine of a PipelineModule: a batch is some micro-batches through all stages, one forward and
one backward in turn (1F1B, Narayanan et al. 2019)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glm_core.deepspeed.engine import DeepSpeedEngine, is_split
from glm_core.deepspeed.foreign import Saved
from glm_core.deepspeed.runtime.pipe import saved
from glm_core.deepspeed.runtime.pipe.feed import Feed
from glm_core.deepspeed.runtime.pipe.module import PipelineError, PipelineModule
from glm_core.deepspeed.runtime.pipe.p2p import Channel
from glm_core.deepspeed.settings import Settings
from glm_core.distributed.placement import Flat, Replicas
from glm_core.errors import CheckpointError, ConfigError, TrainingError


class Flight(NamedTuple):
    """A micro-batch between its forward and its backward on this stage."""

    inputs: list[Tensor]
    """received, whose gradients go back"""
    outputs: list[Tensor]
    """sent, whose gradients will come; on the last stage the loss"""


class PipelineEngine(Feed, DeepSpeedEngine):
    """One stage of one replica. `train_batch` is a whole step: `gradient_accumulation_steps`
    micro-batches, reduction, update. At most as many are under way as stages follow, plus one."""

    module: PipelineModule

    def __init__(self, module: PipelineModule, settings: Settings, **given: Any) -> None:
        """As DeepSpeedEngine. Raises ConfigError."""
        if settings.stage > 1:
            raise ConfigError(
                f"zero_optimization.stage={settings.stage}: a pipeline takes 0 or 1, in DeepSpeed "
                "too; use 1"
            )
        interval = int(settings.raw.get("pipeline", {}).get("activation_checkpoint_interval") or 0)
        if interval:
            module.set_checkpoint_interval(interval)
        if not any(p.requires_grad for p in module.parameters()):
            raise ConfigError(
                f"pipeline stage {module.stage_id}: has no trainable parameter (layers "
                f"{module.parts}); use another partition_method or fewer stages"
            )
        super().__init__(module, settings, **given)
        self.grid, self.stage_id = module.mpu(), module.stage_id
        self.num_stages, self.is_pipe_parallel = module.num_stages, module.num_stages > 1
        self.is_data_parallel = self.grid.data_parallel_size > 1
        self.is_model_parallel = self.grid.model_parallel_size > 1
        self.channel = Channel(self.grid, self.device, module.dynamic_shape)
        self.agg_train_loss: Tensor | None = None
        self.agg_additional_losses: dict[str, Tensor] | None = None
        self._at_boundary = False

    # --- where this is ---

    def get_pipeline_parallel_rank(self) -> int:
        """The stage."""
        return self.stage_id

    @property
    def micro_batches(self) -> int:
        """Of a batch."""
        return self.settings.accumulation

    @property
    def micro_batch_size(self) -> int:
        """Samples of a micro-batch."""
        return self.settings.micro_batch

    # --- one micro-batch on this stage ---

    def _forward(self, compute_loss: bool = True) -> tuple[Flight, Any, Any]:
        """Receives, computes; nothing is sent yet. The flight, the outputs, and on the last stage
        the loss (the outputs without a loss function)."""
        inputs, labels = self._micro_batch()
        received: list[Tensor] = []
        if not self.is_first_stage():
            inputs = self.channel.receive()
            tensors = inputs if isinstance(inputs, tuple) else (inputs,)
            received = [x for x in tensors if x.requires_grad]
            # a first layer that works in place must not find a leaf
            own = tuple(x.clone() if x.requires_grad else x for x in tensors)
            inputs = own if isinstance(inputs, tuple) else own[0]
        outputs = super().forward(inputs)
        if not self.is_last_stage():
            each = outputs if isinstance(outputs, tuple) else (outputs,)
            sent = [x for x in each if isinstance(x, Tensor) and x.requires_grad]
            return Flight(received, sent), outputs, None
        loss_fn = self.module.loss_fn
        loss = loss_fn(outputs, labels) if compute_loss and loss_fn is not None else outputs
        return Flight(received, [loss] if isinstance(loss, Tensor) else []), outputs, loss

    def _backward(self, flight: Flight, gradients: list[Tensor]) -> None:
        """gradients: of the flight's outputs; none on the last stage."""
        if self.is_last_stage():
            [loss] = flight.outputs
            ((loss / self.micro_batches).float() * self.scaler.scale).backward()
        elif flight.outputs:
            torch.autograd.backward(flight.outputs, gradients)
        for holder in self.holders:
            holder.backward_done(False)
        self.channel.send_gradients(
            [torch.zeros_like(x) if x.grad is None else x.grad for x in flight.inputs]
        )

    # --- a batch ---

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """One step over micro_batches items of data_iter (None: of the training data); the mean
        loss over them and the replicas, on every rank. Raises StopIteration where the data end,
        and TrainingError."""
        if not torch.is_grad_enabled():
            raise PipelineError("train_batch: gradients are disabled; call eval_batch")
        self._needs_optimizer("train_batch")
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        self.module.train()
        losses = self._one_forward_one_backward()
        self._at_boundary = True
        self._add_up_ties()
        for holder in self.holders:
            holder.backward_done(True)
        self._update({})
        self._at_boundary = False
        self.micro_steps += self.micro_batches
        self._report(losses)
        assert self.agg_train_loss is not None
        return self.agg_train_loss

    def _one_forward_one_backward(self) -> list[Tensor]:
        """Of each micro-batch, on the last stage, the loss and after it the module's additional
        ones."""
        self.channel.begin()
        count = self.micro_batches
        ahead = min(self.num_stages - 1 - self.stage_id, count)
        waiting: deque[Flight] = deque()
        losses: list[Tensor] = []
        for i in range(count):
            flight, outputs, loss = self._forward()
            waiting.append(flight)
            if self.is_last_stage():
                losses.append(self._checked(loss))
            if i < ahead:
                self.channel.send(outputs)
                continue
            oldest = waiting.popleft()
            # the neighbour sends its gradient first, then takes this: both in one order
            gradients = self._gradients(oldest)
            self.channel.send(outputs)
            self._backward(oldest, gradients)
        while waiting:
            oldest = waiting.popleft()
            self._backward(oldest, self._gradients(oldest))
        return losses

    def _gradients(self, flight: Flight) -> list[Tensor]:
        return [] if self.is_last_stage() else self.channel.receive_gradients(flight.outputs)

    def _checked(self, loss: Any) -> Tensor:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TrainingError(f"pipeline: the loss is {what}; return one number from loss_fn")
        more = (self.module.get_additional_losses() or {}).values()
        return torch.stack([x.detach().float().reshape(()) for x in (loss, *more)])

    @torch.no_grad()
    def _add_up_ties(self) -> None:
        """A tied weight's gradient is its sum over the stages that use it."""
        holders = {p: h for h in self.holders for p in h.params}
        for tie in self.module.ties:
            holder = holders.get(tie.weight)
            if holder is not None:
                assert isinstance(holder, Flat | Replicas)
                dist.all_reduce(holder.unreduced(tie.weight), group=tie.group)

    def _copies(self, param: nn.Parameter) -> int:
        """A stage's weight is on its replicas and, unless it is marked as split, slices; a tied one
        on those of all its stages."""
        stages = next((len(t.ranks) for t in self.module.ties if t.weight is param), 1)
        return (
            self.dp_world_size * stages * (1 if is_split(param) else self.grid.slice_parallel_size)
        )

    def _report(self, losses: list[Tensor]) -> None:
        """Means over micro-batches and replicas, to all stages."""
        names = list(self.module.get_additional_losses() or {})
        mean = torch.zeros(1 + len(names), device=self.device)
        if self.is_last_stage():
            mean = self._mean_over_replicas(torch.stack(losses).mean(0))
        self._tell(mean)
        self.agg_train_loss = mean[0]
        more = dict(zip(names, mean[1:], strict=True))
        self.agg_additional_losses = more or None

    def _mean_over_replicas(self, value: Tensor) -> Tensor:
        dist.all_reduce(value, group=self.dp_group)
        return value / self.dp_world_size

    def _tell(self, value: Tensor) -> None:
        """The last stage's for all."""
        last = self.grid.stage_to_global(self.num_stages - 1)
        dist.broadcast(value, last, self.grid.get_pipe_parallel_group())

    @torch.no_grad()
    def eval_batch(
        self,
        data_iter: Iterator[Any],
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Any:
        """The mean loss (compute_loss=False: the mean of the outputs) over micro-batches and
        replicas, or with reduce_output None the list of them; on the last stage, with bcast_loss a
        loss on all. return_logits: and the last micro-batch's outputs, None on the other stages.
        The module is left in eval mode."""
        if reduce_output not in ("avg", None):
            raise ConfigError(f"eval_batch: reduce_output={reduce_output!r}; use 'avg' or None")
        self.module.eval()
        before = (self.training_dataloader, self.data_iterator)
        self.training_dataloader, self.data_iterator = None, data_iter
        self.channel.begin()
        results, outputs = [], None
        for _ in range(num_micro_batches or self.micro_batches):
            _, outputs, result = self._forward(compute_loss)
            self.channel.send(outputs)
            results.append(result)
        self.training_dataloader, self.data_iterator = before
        found = self._over_batch(results, reduce_output) if self.is_last_stage() else None
        if compute_loss and bcast_loss and reduce_output:
            found = self._told(found)
        return (found, outputs if self.is_last_stage() else None) if return_logits else found

    def _over_batch(self, results: list[Any], how: str | None) -> Any:
        if how is None:
            return results
        if isinstance(results[0], Tensor):
            return self._mean_over_replicas(torch.stack(results).mean(0))
        return tuple(self._over_batch(list(each), how) for each in zip(*results, strict=True))

    def _told(self, loss: Any) -> Any:
        if loss is not None and not (isinstance(loss, Tensor) and loss.numel() == 1):
            raise ConfigError("eval_batch: bcast_loss sends one number; pass bcast_loss=False")
        value = torch.zeros((), device=self.device)
        if loss is not None:
            value = loss.float().reshape(()).clone()
        self._tell(value)
        return value

    # --- what a pipeline has not, and has otherwise ---

    def is_gradient_accumulation_boundary(self) -> bool:
        """Only while `train_batch` reduces and updates."""
        return self._at_boundary

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise PipelineError(
            "Only train_batch() is accessible in pipeline mode: a pipeline runs "
            "forward, backward and step itself"
        )

    forward = backward = step = _refuse

    def get_additional_losses(self) -> dict[str, Tensor] | None:
        """The last batch's means of the module's."""
        return self.agg_additional_losses

    def reset_activation_shape(self) -> None:
        """Taken; shapes are agreed anew for every batch."""

    def set_has_attention_mask(self, value: bool) -> None:
        """Taken; masks travel as they are."""

    def load_module_state_dict(
        self,
        state_dict: dict[str, Any],
        strict: bool = True,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> None:
        """This stage's of the whole model's weights, and from them the masters."""
        own = self.module.state_dict()
        mine = {name: value for name, value in state_dict.items() if name in own}
        known = self.module.names_a_layer
        strange = sorted(n for n in state_dict.keys() - own.keys() if not known(n))
        if strict and strange:
            raise CheckpointError(f"checkpoint: not of this model: {', '.join(strange[:5])}")
        super().load_module_state_dict(mine, strict, custom_load_fn)

    def read_checkpoint(self, place: Any) -> Saved:
        """All stages', from any number of them."""
        return saved.read(place, self)
