"""Right kernels of attention, loss, embedding and optimizer that round differently; shapes as in
`rearranged`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from glm_core import ops
from glm_core.faults.rearranged import Order, double
from glm_core.faults.variants import Arguments, Function, Gradients
from glm_core.faults.wrong_attention import Weights, hidden_keys
from glm_core.faults.wrong_training import adam
from glm_core.ops.precision import wide

F = torch.nn.functional
reference = ops.attention.reference


def ordered_heads(order: Order) -> Function:
    """The sum over E in another order."""

    def kernel(**a: Any) -> Tensor:
        at = order(a["q"].shape[-1])
        return reference(**a | {n: a[n][..., at] for n in "qkv"})[..., torch.argsort(at)]

    return kernel


def flash(block: int, rounding: bool) -> Function:
    """Online softmax over blocks of keys, normalised at the end (Dao et al. 2022, algorithm 1);
    with `rounding` the unnormalised probabilities are rounded to the working dtype for the product
    with v."""

    def kernel(**a: Any) -> Tensor:
        q, k, v = a["q"], wide(a["k"]), wide(a["v"])
        qs = wide(q).unflatten(2, (k.shape[2], -1)) * a["scale"]
        hidden = hidden_keys(a)
        m = torch.full_like(qs[..., :1], -1e30).permute(0, 2, 3, 1, 4)  # [B, K, R, L, 1]
        total, out = torch.zeros_like(m), torch.zeros_like(qs).permute(0, 2, 3, 1, 4)
        for at in range(0, k.shape[1], block):
            part, unseen = slice(at, at + block), hidden[..., at : at + block]
            s = torch.einsum("blkre,bske->bkrls", qs, k[:, part]).masked_fill(unseen, -1e30)
            new = torch.maximum(m, s.amax(-1, keepdim=True).detach())
            p = torch.exp(s - new).masked_fill(unseen, 0.0)
            kept, m = torch.exp(m - new), new
            total = total * kept + p.sum(-1, keepdim=True)
            p = p.to(q.dtype).float() if rounding else p
            out = out * kept + torch.einsum("bkrls,bske->bkrle", p, v[:, part])
        y = (out / total.clamp(min=1e-30)).permute(0, 3, 1, 2, 4)
        return y.flatten(2, 3).to(q.dtype)

    return kernel


def native_attention(up: Callable[[Tensor], Tensor]) -> Function:
    """torch's scaled_dot_product_attention, inputs passed through `up`."""

    def kernel(**a: Any) -> Tensor:
        repeats = a["q"].shape[2] // a["k"].shape[2]
        q = up(a["q"]).transpose(1, 2)
        k, v = (up(a[n]).repeat_interleave(repeats, 2).transpose(1, 2) for n in "kv")
        y = F.scaled_dot_product_attention(q, k, v, ~hidden_keys(a)[:, 0], scale=a["scale"])
        return y.transpose(1, 2).to(a["q"].dtype)

    return kernel


def binary_softmax(s: Tensor, hidden: Tensor) -> Tensor:
    """exp2 of scores times log2(e)."""
    t = s * math.log2(math.e)
    e = torch.exp2(t - t.amax(-1, keepdim=True)).masked_fill(hidden, 0.0)
    return e / e.sum(-1, keepdim=True).clamp(min=1e-30)


def softmax_without_max(s: Tensor, hidden: Tensor) -> Tensor:
    """Scores of these models stay far below exp's overflow at 88."""
    e = torch.exp(s.clamp(max=80.0)).masked_fill(hidden, 0.0)
    return e / e.sum(-1, keepdim=True).clamp(min=1e-30)


def late_scale(weights: Weights) -> Function:
    """Scores multiplied by the scale after the product, normalisation after the product with v."""

    def kernel(**a: Any) -> Tensor:
        q = wide(a["q"]).unflatten(2, (a["k"].shape[2], -1))
        s = torch.einsum("blkre,bske->bkrls", q, wide(a["k"])) * a["scale"]
        p = weights(s.masked_fill(hidden_keys(a), -1e30), hidden_keys(a))
        return torch.einsum("bkrls,bske->blkre", p, wide(a["v"])).flatten(2, 3).to(a["q"].dtype)

    return kernel


def padded_keys(number: int) -> Function:
    """Keys and values with rows in front that no query sees."""

    def kernel(**a: Any) -> Tensor:
        more = {n: F.pad(a[n], (0, 0, 0, 0, number, 0)) for n in "kv"}
        moved = {n: a[n] + number for n in ("key_start", "key_end")}
        return reference(**a | more | moved)

    return kernel


def query_blocks(size: int) -> Function:
    """Block of queries after block of queries; the gradients of k and v are summed over them."""

    def kernel(**a: Any) -> Tensor:
        names, length = ("q", "key_start", "key_end"), a["q"].shape[1]
        cuts = range(0, length, size)
        return torch.cat(
            [reference(**a | {n: a[n][:, at : at + size] for n in names}) for at in cuts], 1
        )

    return kernel


# embedding ----------------------------------------------------------------------------


def summed_wide(a: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
    """Gradients of equal rows summed in float64, rounded once."""
    total = torch.zeros_like(a["weight"], dtype=torch.float64)
    rows = outputs[0].flatten(0, -2).double() * a["shrink"]
    return {"weight": total.index_add_(0, a["ids"].flatten(), rows).to(a["weight"].dtype)}


def summed_backwards(a: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
    """Gradients of equal rows summed from the last to the first in float32."""
    total = torch.zeros_like(a["weight"], dtype=torch.float32)
    rows = wide(outputs[0].flatten(0, -2)).flip(0) * a["shrink"]
    return {"weight": total.index_add_(0, a["ids"].flatten().flip(0), rows).to(a["weight"].dtype)}


def one_hot(ids: Tensor, weight: Tensor, shrink: float) -> Tensor:
    """A product with one-hot rows, so the gradient is a matrix product."""
    rows = F.one_hot(ids, weight.shape[0]).to(weight.dtype) @ weight
    fixed = rows.detach()
    return fixed + shrink * (rows - fixed)


# loss ---------------------------------------------------------------------------------


def split_vocabulary(parts: int) -> Callable[[Tensor, Tensor], Tensor]:
    """logsumexp of the logsumexp of parts of the vocabulary."""

    def each(z: Tensor, labels: Tensor) -> Tensor:
        sums = torch.stack([torch.logsumexp(p, -1) for p in z.chunk(parts, -1)], -1)
        return torch.logsumexp(sums, -1) - z.gather(-1, labels[:, None])[:, 0]

    return each


def chunked_loss(rows: int) -> Function:
    """Chunks of tokens, each with its own product and sum."""

    def kernel(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
        chunks = zip(*(t.split(rows) for t in (x, labels, token_weight)), strict=True)
        parts = [
            ops.linear_cross_entropy.reference(x, weight, labels, w) for x, labels, w in chunks
        ]
        return torch.stack(parts).sum()

    return kernel


def padded_loss(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    """Eleven tokens of weight zero in front."""
    more = (F.pad(x, (0, 0, 11, 0)), weight, F.pad(labels, (11, 0)), F.pad(token_weight, (11, 0)))
    return ops.linear_cross_entropy.reference(*more)


def unrounded_logits(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    """Logits stay in float32."""
    return ops.linear_cross_entropy.reference(wide(x), wide(weight), labels, token_weight)


# optimizer ----------------------------------------------------------------------------


def flat_norm(tensors: Sequence[Tensor]) -> Tensor:
    """One sum over everything."""
    return torch.cat([wide(t).flatten() for t in tensors]).square().sum().sqrt()


def reversed_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Squares of the norms added from the last tensor to the first."""
    total = torch.zeros(())
    for t in reversed(tensors):
        total = total + wide(t).square().sum()
    return total.sqrt()


def foreach_adamw(**a: Any) -> None:
    """The arithmetic of torch.optim.AdamW's foreach path: corrections folded into step size and
    root."""
    ps, gs, ms, vs = (list(a[n]) for n in ("params", "grads", "exp_avgs", "exp_avg_sqs"))
    grads = [g.to(p.dtype) * a["grad_scale"] for p, g in zip(ps, gs, strict=True)]
    torch._foreach_mul_(ps, 1 - a["lr"] * a["weight_decay"])
    torch._foreach_lerp_(ms, grads, 1 - a["beta1"])
    torch._foreach_mul_(vs, a["beta2"])
    torch._foreach_addcmul_(vs, grads, grads, 1 - a["beta2"])
    roots = list(torch._foreach_sqrt(vs))
    torch._foreach_div_(roots, math.sqrt(1 - a["beta2"] ** a["step"]))
    torch._foreach_add_(roots, a["eps"])
    torch._foreach_addcdiv_(ps, ms, roots, -a["lr"] / (1 - a["beta1"] ** a["step"]))
    for copy, p in zip(a["copies"] or (), ps, strict=bool(a["copies"])):
        copy.copy_(p)


def precise_adamw(**a: Any) -> None:
    """Everything in float64, each result rounded once."""
    names = ("params", "exp_avgs", "exp_avg_sqs")
    up = {k: double(v) for k, v in a.items()} | {"copies": None}
    ops.adamw.reference(**up)
    for name in names:
        for to, value in zip(a[name], up[name], strict=True):
            to.copy_(value)
    for copy, p in zip(a["copies"] or (), a["params"], strict=bool(a["copies"])):
        copy.copy_(p)


def root_folded(v: Tensor, correction: float, a: Arguments) -> Tensor:
    """sqrt(v) / sqrt(correction) + eps."""
    return v.sqrt() / math.sqrt(correction) + a["eps"]


def folded_adamw() -> Function:
    return adam(denominator=root_folded)
