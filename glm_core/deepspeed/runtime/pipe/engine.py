"""Trains a PipelineModule: runs a batch's micro-batches through all stages, one forward and one
backward in turn (1F1B, Narayanan et al. 2019)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glm_core.deepspeed.checkpoint.content import Content
from glm_core.deepspeed.runtime.engine import DeepSpeedEngine, is_split
from glm_core.deepspeed.runtime.pipe import checkpoint
from glm_core.deepspeed.runtime.pipe.feed import Feed
from glm_core.deepspeed.runtime.pipe.module import PipelineError, PipelineModule
from glm_core.deepspeed.runtime.pipe.p2p import Channel
from glm_core.deepspeed.settings import Settings
from glm_core.distributed.placement import FlatStore, ReplicaStore
from glm_core.errors import CheckpointError, ConfigError, TrainingError


class Flight(NamedTuple):
    """A micro-batch between its forward and its backward on this stage."""

    inputs: list[Tensor]
    """tensors received from the previous stage, which waits for their gradients"""
    outputs: list[Tensor]
    """tensors sent to the next stage, which will send their gradients; on the last stage the
    loss"""


class PipelineEngine(Feed, DeepSpeedEngine):
    """Trains one stage of one replica. `train_batch` is a whole step: `gradient_accumulation_steps`
    micro-batches, their reduction and an update. A stage holds at most one micro-batch more than
    stages follow it."""

    module: PipelineModule

    def __init__(self, module: PipelineModule, settings: Settings, **arguments: Any) -> None:
        """See DeepSpeedEngine for the arguments. Raises ConfigError."""
        if settings.stage > 1:
            raise ConfigError(
                f"zero_optimization.stage={settings.stage}: a pipeline takes 0 or 1, as in "
                "DeepSpeed; use 1"
            )
        interval = int(settings.raw.get("pipeline", {}).get("activation_checkpoint_interval") or 0)
        if interval:
            module.set_checkpoint_interval(interval)
        if not any(p.requires_grad for p in module.parameters()):
            raise ConfigError(
                f"pipeline stage {module.stage_id}: has no trainable parameter (layers "
                f"{module.parts}); use another partition_method or fewer stages"
            )
        super().__init__(module, settings, **arguments)
        self.grid, self.stage_id = module.mpu(), module.stage_id
        self.num_stages, self.is_pipe_parallel = module.num_stages, module.num_stages > 1
        self.is_data_parallel = self.grid.data_parallel_size > 1
        self.is_model_parallel = self.grid.model_parallel_size > 1
        self.channel = Channel(self.grid, self.device, module.dynamic_shape)
        self.agg_train_loss: Tensor | None = None
        self.agg_additional_losses: dict[str, Tensor] | None = None
        self._at_boundary = False

    # --- accessors ---

    def get_pipeline_parallel_rank(self) -> int:
        """Returns the stage's number."""
        return self.stage_id

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches of a batch."""
        return self.settings.accumulation

    @property
    def micro_batch_size(self) -> int:
        """The number of samples of a micro-batch."""
        return self.settings.micro_batch

    # --- one micro-batch on this stage ---

    def _forward(self, compute_loss: bool = True) -> tuple[Flight, Any, Any]:
        """Receives a micro-batch and computes this stage; sends nothing yet. Returns the flight,
        the outputs, and on the last stage the loss (the outputs where there is no loss
        function)."""
        inputs, labels = self._micro_batch()
        received: list[Tensor] = []
        if not self.is_first_stage():
            inputs = self.channel.receive()
            tensors = inputs if isinstance(inputs, tuple) else (inputs,)
            received = [x for x in tensors if x.requires_grad]
            # clones, since a first layer may work in place, which a leaf forbids
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
        """Computes a flight's gradients and sends those of its inputs back. gradients: those of its
        outputs; none on the last stage."""
        with self._calls_backward():
            if self.is_last_stage():
                [loss] = flight.outputs
                ((loss / self.micro_batches).float() * self.scaler.scale).backward()
            elif flight.outputs:
                torch.autograd.backward(flight.outputs, gradients)
        for store in self.stores:
            store.backward_done(False)
        self.channel.send_gradients(
            [torch.zeros_like(x) if x.grad is None else x.grad for x in flight.inputs]
        )

    # --- a batch ---

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """Trains one step over micro_batches items of data_iter (None: of the training data).
        Returns on every rank the mean loss over micro-batches and replicas. Raises TrainingError,
        and StopIteration where the data end."""
        if not torch.is_grad_enabled():
            raise PipelineError("train_batch: gradients are disabled; call eval_batch")
        self._needs_optimizer("train_batch")
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        self.module.train()
        losses = self._one_forward_one_backward()
        self._at_boundary = True
        self._add_up_ties()
        for store in self.stores:
            store.backward_done(True)
        self._update({})
        self._at_boundary = False
        self.micro_steps += self.micro_batches
        self._share_losses(losses)
        assert self.agg_train_loss is not None
        return self.agg_train_loss

    def _one_forward_one_backward(self) -> list[Tensor]:
        """Runs all micro-batches forward and backward. Returns on the last stage one vector per
        micro-batch: its loss, then the module's additional losses."""
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
            # in the next stage's order, or both would wait: it sends its gradient, then receives
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
            raise TrainingError(
                f"pipeline: the loss is {what}, not a number; return one from loss_fn"
            )
        more = (self.module.get_additional_losses() or {}).values()
        return torch.stack([x.detach().float().reshape(()) for x in (loss, *more)])

    @torch.no_grad()
    def _add_up_ties(self) -> None:
        """Sums a tied weight's gradient over the stages that use it."""
        stores = {p: store for store in self.stores for p in store.params}
        for tie in self.module.ties:
            store = stores.get(tie.weight)
            if store is not None:
                assert isinstance(store, FlatStore | ReplicaStore)
                dist.all_reduce(store.unreduced(tie.weight), group=tie.group)

    def _copies(self, param: nn.Parameter) -> int:
        """Returns on how many ranks the same elements are: the stage's replicas, times its slices
        unless the weight is marked as split, times the stages of its tie."""
        stages = next((len(t.ranks) for t in self.module.ties if t.weight is param), 1)
        return (
            self.dp_world_size * stages * (1 if is_split(param) else self.grid.slice_parallel_size)
        )

    def _share_losses(self, losses: list[Tensor]) -> None:
        """Sends the mean losses over micro-batches and replicas to all stages."""
        names = list(self.module.get_additional_losses() or {})
        mean = torch.zeros(1 + len(names), device=self.device)
        if self.is_last_stage():
            mean = self._mean_over_replicas(torch.stack(losses).mean(0))
        self._broadcast_from_last(mean)
        self.agg_train_loss = mean[0]
        more = dict(zip(names, mean[1:], strict=True))
        self.agg_additional_losses = more or None

    def _mean_over_replicas(self, value: Tensor) -> Tensor:
        dist.all_reduce(value, group=self.dp_group)
        return value / self.dp_world_size

    def _broadcast_from_last(self, value: Tensor) -> None:
        """Gives all stages the last one's value."""
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
        """Returns the mean loss over micro-batches and replicas on the last stage, and on the
        others None; with bcast_loss it is returned on all. Without compute_loss it is the mean of
        the outputs, and with reduce_output None the list over micro-batches. return_logits: returns
        a pair, with the last micro-batch's outputs on the last stage. The module is left in eval
        mode."""
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
        result = self._over_batch(results, reduce_output) if self.is_last_stage() else None
        if compute_loss and bcast_loss and reduce_output:
            result = self._broadcast_loss(result)
        return (result, outputs if self.is_last_stage() else None) if return_logits else result

    def _over_batch(self, results: list[Any], how: str | None) -> Any:
        if how is None:
            return results
        if isinstance(results[0], Tensor):
            return self._mean_over_replicas(torch.stack(results).mean(0))
        return tuple(self._over_batch(list(each), how) for each in zip(*results, strict=True))

    def _broadcast_loss(self, loss: Any) -> Any:
        if loss is not None and not (isinstance(loss, Tensor) and loss.numel() == 1):
            raise ConfigError("eval_batch: bcast_loss sends one number; pass bcast_loss=False")
        value = torch.zeros((), device=self.device)
        if loss is not None:
            value = loss.float().reshape(()).clone()
        self._broadcast_from_last(value)
        return value

    # --- calls that a pipeline refuses or answers in its own way ---

    def is_gradient_accumulation_boundary(self) -> bool:
        """Is `train_batch` reducing and updating right now?"""
        return self._at_boundary

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise PipelineError(
            "engine.forward, backward and step: a pipeline runs them itself. "
            "Only train_batch() is accessible in pipeline mode; call it or eval_batch()"
        )

    forward = backward = step = _refuse

    def get_additional_losses(self) -> dict[str, Tensor] | None:
        """Returns the means of the module's additional losses over the last batch."""
        return self.agg_additional_losses

    def reset_activation_shape(self) -> None:
        """Does nothing: every batch sends its shapes again."""

    def set_has_attention_mask(self, value: bool) -> None:
        """Does nothing: masks are sent as they are."""

    def load_module_state_dict(
        self,
        state_dict: dict[str, Any],
        strict: bool = True,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> None:
        """Sets this stage's weights from the whole model's, and from them the masters."""
        own = self.module.state_dict()
        mine = {name: value for name, value in state_dict.items() if name in own}
        known = self.module.names_a_layer
        strange = sorted(n for n in state_dict.keys() - own.keys() if not known(n))
        if strict and strange:
            raise CheckpointError(
                f"checkpoint: holds weights of no layer of this model: {', '.join(strange[:5])}; "
                "load one of this model, or pass load_module_strict=False"
            )
        super().load_module_state_dict(mine, strict, custom_load_fn)

    def read_checkpoint(self, place: Path) -> Content:
        """Reads the content that `load_checkpoint` loads: all stages', from any number of them."""
        stage = checkpoint.Stage(
            grid=self.grid,
            names=list(self.names.values()),
            group_members=[self.names[store.params[0]] for store in self.stores],
            prefix=self.module.prefix,
        )
        return checkpoint.read(place, stage)
