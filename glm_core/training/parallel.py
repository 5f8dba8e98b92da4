"""What a training step does differently on one process and on many, and how one process does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from glm_core import dispatch, ops
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.config import RunConfig
from glm_core.diagnose import nonfinite
from glm_core.errors import ConfigError
from glm_core.model.glm import GLM
from glm_core.spec import Support
from glm_core.training.batches import Batch, Sampler
from glm_core.training.graph import RecordedLoss
from glm_core.training.optimizer import Optimizer, sum_in_float32
from glm_core.training.row_tree import RowTree, norm_of_all, tree_sum
from glm_core.versions import lack_of


class Parallel(Protocol):
    """A process's part of the model, and its work together with the other processes. Every process
    calls the methods in the same order. SingleProcess is the plan of ones; many processes are in
    glm_core.distributed.parallel."""

    backend: Backend
    device: torch.device
    dtype: torch.dtype
    """of weights and activations"""

    @property
    def model(self) -> nn.Module:
        """What this process holds, its parameters named as in the whole model."""

    @property
    def is_reporter(self) -> bool:
        """Whether this process writes the metrics and says what happens."""

    def initial_weights(self) -> dict[str, Tensor]:
        """Float32 weights to start from, this process's part; empty where the model has its own."""

    def batches(self, sampler: Sampler, sequences: int) -> list[Batch]:
        """Draws a step's sequences, in the portions that `forward_backward` takes."""

    def forward_backward(self, batch: Batch, token_weight: Tensor) -> Tensor:
        """Adds the gradients of sum(token_weight * cross-entropy) to `.grad`. Returns this
        process's part of that sum, a float32 scalar."""

    def sum_gradients(self) -> None:
        """Adds up the parts of a gradient that several processes have, after the last batch."""

    def sum_loss(self, loss: Tensor) -> Tensor:
        """Adds up the parts of a loss that several processes have."""

    def sum_counts(self, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds up what the processes have counted in their layers; by layer, in the model's
        order. Returns the counts of all layers of the model."""

    def norm(self, grads: dict[str, Tensor]) -> Tensor:
        """The norm of the whole gradient, from this process's part by parameter."""

    def locate_nonfinite(self, backward: Callable[[], object]) -> tuple[str, str]:
        """Runs `backward` again and returns the op, and the parameter, in which numbers first
        stopped being finite; "" where there is none."""

    def tensors(self, optimizer: Optimizer) -> dict[str, Any]:
        """What a checkpoint holds, by name; loading fills it in place."""

    def restore_random_state(self, tensors: dict[str, Any]) -> None:
        """Sets the random generators from `tensors`, which a checkpoint has filled."""

    def facts(self) -> dict[str, Any]:
        """JSON-able facts that a checkpoint states beside the trainer's own."""


class SingleProcess:
    """The whole model in one process: nothing is shared, and nothing to be summed."""

    is_reporter = True

    def __init__(
        self,
        config: RunConfig,
        backend: Backend | None = None,
        *,
        weights: dict[str, Tensor] | None = None,
        model: GLM | None = None,
    ) -> None:
        """backend: by default the config's, found by its name. weights: float32, to start from
        instead of the config's seed. model: one that has its weights; only its parameters that are
        not frozen are trained and saved. Raises ConfigError for what the backend cannot do."""
        t = config.train
        self.config = config
        self.backend = backend = backend or registry.usable(t.backend)
        self.device = backend.device()
        self.dtype: torch.dtype = getattr(torch, t.dtype)
        require_able(config, backend, prefix=hasattr(model, "prefix"))
        self._weights = {} if model is not None else weights
        self.model = (model or GLM(config.model)).to(self.device, self.dtype)
        if t.global_batch > t.micro_batch or t.exact:
            sum_in_float32(self.model)
        self._tree = RowTree(self.model) if t.exact else None
        self._losses: list[Tensor] = []
        """of an exact step's sequences"""
        self.loss: Callable[..., Tensor] = self.model.loss
        if t.compile:
            self.loss = torch.compile(self.model.loss, fullgraph=True)
        self.recorded: RecordedLoss | None = None
        if t.graph:
            graphs = backend.graphs(self.device)
            assert not isinstance(graphs, Support)  # require_able
            self.recorded = RecordedLoss(self.model, self.loss, graphs)

    def initial_weights(self) -> dict[str, Tensor]:
        return initial_weights(self.config) if self._weights is None else self._weights

    def batches(self, sampler: Sampler, sequences: int) -> list[Batch]:
        size = self.config.train.micro_batch
        return [sampler.next(size) for _ in range(sequences // size)]

    def forward_backward(self, batch: Batch, token_weight: Tensor) -> Tensor:
        on_host = (
            batch.tokens,
            batch.positions,
            batch.key_start,
            batch.key_end,
            batch.labels,
            token_weight,
        )
        inputs = tuple(x.to(self.device) for x in on_host)
        if self.recorded is not None and not dispatch.intercepted():
            return self.recorded(inputs)
        if self._tree is not None:
            return self._row_by_row(self._tree, inputs)
        loss = self.loss(*inputs)
        loss.backward()
        return loss.detach()

    def _row_by_row(self, tree: RowTree, inputs: tuple[Tensor, ...]) -> Tensor:
        """Adds each sequence to the tree; `sum_loss` returns the loss of all."""
        for i in range(len(inputs[0])):
            loss = self.loss(*(x[i : i + 1] for x in inputs))
            loss.backward()
            tree.add()
            self._losses.append(loss.detach())
        return torch.zeros((), device=self.device)

    def sum_gradients(self) -> None:
        """Every gradient is whole, but those of an exact run wait in its tree."""
        if self._tree is not None:
            self._tree.finish()

    def sum_loss(self, loss: Tensor) -> Tensor:
        if self._tree is None:
            return loss
        losses, self._losses = self._losses, []
        return tree_sum(loss.clone() for loss in losses)

    def sum_counts(self, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        return counts

    def norm(self, grads: dict[str, Tensor]) -> Tensor:
        if self._tree is None:
            return ops.global_norm(list(grads.values()))
        return norm_of_all(ops.global_norm([grad]) for grad in grads.values())

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Computes the loss in the block without torch.compile, and without a recording."""
        before = self.loss, self.recorded
        self.loss, self.recorded = self.model.loss, None
        try:
            yield
        finally:
            self.loss, self.recorded = before

    def locate_nonfinite(self, backward: Callable[[], object]) -> tuple[str, str]:
        with self.eager(), nonfinite.watch(self.model) as seen:
            backward()
        return seen.op, seen.parameter

    def tensors(self, optimizer: Optimizer) -> dict[str, Any]:
        return {
            **optimizer.state()["tensors"],
            "rng.torch": torch.get_rng_state(),
            "rng.backend": self.backend.rng_state(),
        }

    def restore_random_state(self, tensors: dict[str, Any]) -> None:
        self.backend.set_rng_state(tensors["rng.backend"])
        torch.set_rng_state(tensors["rng.torch"])

    def facts(self) -> dict[str, Any]:
        return {}


EXPERT_OPS = ("route", "permute", "grouped_linear", "unpermute")
"""what a layer of experts calls"""


def require_able(config: RunConfig, backend: Backend, prefix: bool = False) -> None:
    """Raises ConfigError for what one process cannot train on the backend. Needs neither data nor
    weights. prefix: whether the model has one (P-Tuning)."""
    registry.require_dtype(backend, config.train.dtype)
    require_exact(config, backend)
    _require_static(config, prefix)
    graphs = backend.graphs(backend.device()) if config.train.graph else None
    if isinstance(graphs, Support):
        raise ConfigError(f"train.graph=True: {graphs.reason}; leave graph out")


def require_exact(config: RunConfig, backend: Backend, plan: bool = False) -> None:
    """Raises ConfigError where an exact run needs what the backend does not sum exactly."""
    if config.train.exact:
        needed = EXPERT_OPS if config.model.num_experts else ()
        if config.model.balance_weight:
            needed = (*needed, "balance_weight")
        registry.require_exact(backend, config.train.dtype, needed, plan)


def _require_static(config: RunConfig, prefix: bool) -> None:
    """Raises ConfigError for what torch.compile or a graph cannot follow from step to step."""
    t = config.train
    if t.exact and (t.compile or t.graph):
        option, other = "compile" if t.compile else "graph", "exact"
        raise ConfigError(
            f"train.{option}=True: not together with train.{other}=True, whose order of sums "
            f"torch.compile may change; leave {option} out"
        )
    for option, what in (("compile", "torch.compile cannot trace"), ("graph", "no graph follows")):
        if prefix and getattr(t, option):
            raise ConfigError(
                f"train.{option}=True: a prefix (P-Tuning) moves the mask by its values, which "
                f"{what}; leave {option} out"
            )
    sums = t.dtype != "float32" and t.global_batch > t.micro_batch
    lack = lack_of("grad_dtype", "a graph that sums micro-batches in float32") if sums else ""
    if t.graph and lack:
        raise ConfigError(f"train.graph=True: {lack}; leave graph out")


def initial_weights(config: RunConfig) -> dict[str, Tensor]:
    """Returns the run's float32 starting weights, the same on every backend and device."""
    model = GLM(config.model).init_weights(config.train.seed)
    return {n: p.detach() for n, p in model.named_parameters()}
