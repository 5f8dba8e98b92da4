"""Wrong kernels of the loss and the optimizer, each with one mistake in it; `bugs` says what they
are.
Shapes: N tokens, D width, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from glm_core.faults.variants import Arguments, Function, Gradients
from glm_core.ops.precision import wide

F = torch.nn.functional


def last_counted(factor: float) -> Callable[[Arguments], Tensor]:
    """token_weight with the last token that counts multiplied by `factor`."""

    def make(a: Arguments) -> Tensor:
        weight: Tensor = a["token_weight"].clone()
        weight[weight.nonzero()[-1:].flatten()] *= factor
        return weight

    return make


def equal_weights(a: Arguments) -> Tensor:
    """token_weight spread evenly over all tokens, those that should not count included."""
    weight: Tensor = a["token_weight"]
    return weight.mean().expand_as(weight)


def cross_entropy(
    logits: Callable[[Tensor], Tensor] = lambda z: z,
    each: Callable[[Tensor, Tensor], Tensor] = lambda z, labels: F.cross_entropy(
        z, labels, reduction="none"
    ),
) -> Function:
    """The op with its logits passed through `logits` and its loss per token given by `each`."""

    def kernel(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
        z = logits(wide(F.linear(x, weight)))
        return (each(z, labels) * token_weight).sum()

    return kernel


def safe_log(z: Tensor, labels: Tensor) -> Tensor:
    """-log(p + 1e-6)."""
    return -torch.log(torch.softmax(z, -1).gather(-1, labels[:, None])[:, 0] + 1e-6)


def half_logit_gradient(a: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
    """The gradient of the logits goes through float16 without a loss scale."""
    z = wide(F.linear(a["x"], a["weight"]))
    dz = torch.softmax(z, -1) - F.one_hot(a["labels"], z.shape[-1])
    dz = (dz * a["token_weight"][:, None] * outputs[0]).half().to(a["x"].dtype)
    return {"x": dz @ a["weight"], "weight": dz.t() @ a["x"]}


def last_class_lost(a: Arguments, found: Gradients) -> Gradients:
    """The last row of the vocabulary receives no gradient."""
    del a
    weight = found["weight"]
    assert weight is not None
    weight[-1] = 0
    return {"weight": weight}


def low_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Each tensor's norm is rounded to bfloat16 before they are combined."""
    parts = [torch.linalg.vector_norm(wide(t)).bfloat16().float() for t in tensors]
    return torch.stack(parts).norm()


def sum_of_norms(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(wide(t)) for t in tensors]).sum()


Gradient = Callable[[Tensor, Tensor, Arguments], Tensor]
"""(gradient, parameter, arguments) -> gradient"""
Denominator = Callable[[Tensor, float, Arguments], Tensor]
"""(second moment, its bias correction, arguments) -> what the first moment is divided by"""


def root(v: Tensor, correction: float, a: Arguments) -> Tensor:
    return (v / correction).sqrt() + a["eps"]


def eps_inside_root(v: Tensor, correction: float, a: Arguments) -> Tensor:
    return (v / correction + a["eps"]).sqrt()


def uncorrected_root(v: Tensor, correction: float, a: Arguments) -> Tensor:
    del correction
    return v.sqrt() + a["eps"]


def coupled(g: Tensor, p: Tensor, a: Arguments) -> Tensor:
    """L2 in the gradient (Adam) instead of decoupled decay (AdamW)."""
    return g + a["weight_decay"] * p


def adam(
    gradient: Gradient = lambda g, p, a: g,
    denominator: Denominator = root,
    keep: Callable[[Tensor], Tensor] = lambda x: x,
    store: Callable[[Tensor], Tensor] = lambda x: x,
    decoupled: bool = True,
    decay_first: bool = True,
    copy_first: bool = False,
) -> Callable[..., None]:
    """AdamW with places for mistakes: `keep` is applied to the stored moments, `store` to the
    copies."""

    def kernel(**a: Any) -> None:
        b1, b2, step = a["beta1"], a["beta2"], a["step"]
        shrink = 1 - a["lr"] * a["weight_decay"] if decoupled else 1.0
        lists = (a[n] for n in ("params", "grads", "exp_avgs", "exp_avg_sqs"))
        for i, (p, grad, m, v) in enumerate(zip(*lists, strict=True)):
            old = p.clone()
            g = gradient(grad.to(p.dtype) * a["grad_scale"].to(p.dtype), p, a)
            m.mul_(b1).add_(g, alpha=1 - b1).copy_(keep(m))
            v.mul_(b2).addcmul_(g, g, value=1 - b2).copy_(keep(v))
            d = denominator(v, 1 - b2**step, a)
            if decay_first:
                p.mul_(shrink)
            p.addcdiv_(m / (1 - b1**step), d, value=-a["lr"])
            if not decay_first:
                p.mul_(shrink)
            if a["copies"] is not None:
                a["copies"][i].copy_(old if copy_first else store(p))

    return kernel


def all_but_last(a: Arguments) -> Sequence[Tensor]:
    """The list of tensors without its last."""
    tensors: Sequence[Tensor] = a["tensors"]
    return tensors[:-1]
