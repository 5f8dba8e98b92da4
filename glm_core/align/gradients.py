"""Compares a captured step's gradients with float64, and reduces them to norms and sketches."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glm_core import dispatch
from glm_core.align import choices
from glm_core.align.training import Run, Snapshot
from glm_core.backends import registry
from glm_core.config import RunConfig
from glm_core.model.glm import GLM

Array = NDArray[np.float64]
NUM_SKETCH = 8
"""numbers in a sketch"""


class Oracle(NamedTuple):
    """What float64 gives for a captured step."""

    loss: float
    gradients: dict[str, Tensor]
    chosen: list[Tensor]
    """the experts that each router chooses for every token; empty without experts"""


def exact_gradients(
    config: RunConfig, snapshot: Snapshot, chosen: list[Tensor] | None = None
) -> Oracle:
    """Returns loss and gradients in float64. The weights are first rounded to the working dtype.
    chosen: what the routers choose, in place of what float64 would."""
    dtype: torch.dtype = getattr(torch, config.train.dtype)
    model = GLM(config.model).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(snapshot.weights[name].to(dtype))
    total = sum(float(b.loss_weight.sum()) for b in snapshot.batches)
    loss = 0.0
    choice = choices.imposed(chosen, len(snapshot.batches)) if chosen else dispatch.intercept(None)
    with choice, registry.use("reference"), choices.recorded(model) as own:
        for b in snapshot.batches:
            weight = b.loss_weight.double() / total
            part = model.loss(b.tokens, b.positions, b.key_start, b.key_end, b.labels, weight)
            part.backward()
            loss += float(part.detach())
    gradients = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }
    return Oracle(loss, gradients, choices.by_layer(model, own))


def load_snapshot(run: Run, snapshot: Snapshot) -> Run:
    """Puts the captured weights and loss scale into the run; returns the run."""
    run.loss_scale.scale = snapshot.loss_scale
    run.optimizer.load_masters({n: w.to(run.device) for n, w in snapshot.weights.items()})
    return run


def following(
    config: RunConfig, snapshot: Snapshot, exact: Oracle, chosen: list[Tensor]
) -> tuple[Oracle, int]:
    """Returns what float64 gives with the experts that a run has `chosen`, by layer, and how many
    tokens have others than in `exact`."""
    tokens = choices.moved_tokens(chosen, exact.chosen) if exact.chosen else 0
    return (exact_gradients(config, snapshot, chosen) if tokens else exact), tokens


def loss_error(loss: float, exact: Oracle) -> float:
    """Returns how far a loss is from float64's, relative to it."""
    return abs(loss - exact.loss) / max(abs(exact.loss), 1e-300)


class GradientErrors(NamedTuple):
    """How far captured steps are from float64."""

    loss: Array
    """relative error of the loss [S]"""
    gradient: Array
    """relative error of each parameter's gradient [S, P]"""
    moved: Array
    """tokens that have other experts, see `choices.moved_tokens` [S]; 0 without experts"""


class Sketches:
    """The norm and the sketch of every parameter's gradient, as a trace keeps them."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.norms, self.sketches = list[list[float]](), list[list[Array]]()

    def add(self, gradients: dict[str, Tensor]) -> None:
        """Adds a captured step."""
        self.norms.append([float(gradients[n].norm()) for n in self.names])
        self.sketches.append([sketch(gradients[n]) for n in self.names])

    def fields(self) -> dict[str, Any]:
        """Returns the trace's norms [S, P] and sketches [S, P, W]."""
        shape = len(self.norms), len(self.names)
        return {
            "gradient_norm": np.array(self.norms).reshape(shape),
            "gradient_sketch": np.array(self.sketches).reshape(*shape, NUM_SKETCH),
        }


def gradient_errors(
    run: Run, snapshots: list[Snapshot], oracle: list[Oracle], sketches: Sketches | None = None
) -> GradientErrors:
    """Returns the errors of a run's captured steps; `oracle` holds the `exact_gradients` of each,
    and `sketches` receives the gradients.
    Where the run chooses other experts, float64 follows it: what then follows from the choice is no
    error. The choices themselves are counted, and judged one by one where each op is."""
    losses, errors, moved = [], [], []
    for snapshot, exact in zip(snapshots, oracle, strict=True):
        load_snapshot(run, snapshot)
        with choices.recorded(run.model) as own:
            loss, gradients = run.gradients(snapshot.batches)
        if sketches is not None:
            sketches.add(gradients)
        exact, tokens = following(
            run.config, snapshot, exact, choices.by_layer(run.model, own) if exact.chosen else []
        )
        moved.append(float(tokens))
        losses.append(loss_error(loss, exact))
        true = exact.gradients
        errors.append([distance(gradients[n], true[n]) for n in sorted(true)])
    shape = (len(snapshots), -1)
    return GradientErrors(np.array(losses), np.array(errors).reshape(shape), np.array(moved))


def distance(x: Tensor, of: Tensor) -> float:
    """Returns |x - of| / |of|, in the Euclidean norm; 0 where both are zero."""
    return float((x - of).norm() / of.norm().clamp(min=torch.finfo(of.dtype).tiny))


def sketch(x: Tensor) -> Array:
    """Returns NUM_SKETCH signed sums over interleaved elements, divided by sqrt(elements). Two
    results that differ have different sketches, and a result cannot be rebuilt from its sketch. The
    signs are the same in every trace."""
    flat = x.detach().cpu().double().flatten().numpy()
    width = 1024 * NUM_SKETCH
    padded = np.zeros(-(-max(flat.size, 1) // width) * width)
    padded[: flat.size] = flat
    signs = np.random.default_rng(0).choice([-1.0, 1.0], width)
    columns = padded.reshape(-1, width).sum(0) * signs
    return columns.reshape(NUM_SKETCH, -1).sum(1) / max(flat.size, 1) ** 0.5
