"""Wrong attention kernels, each the reference's formula with one mistake in it; `bugs` says what
they are.
Shapes: B batch, L queries, S keys, H heads, K kv heads, R = H/K heads per kv head, E head dim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm_core import ops
from glm_core.faults.variants import Arguments, Function, Gradients, Vjp, vjp
from glm_core.ops.precision import wide

reference = ops.attention.reference
Weights = Callable[[Tensor, Tensor], Tensor]
"""(scores, hidden) -> probabilities, both [B, K, R, L, S]; hidden broadcasts over K and R"""


def hidden_keys(a: Arguments) -> Tensor:
    """Which keys a query must not see, [B, 1, 1, L, S]."""
    j = torch.arange(a["k"].shape[1])
    visible = (j >= a["key_start"][..., None]) & (j < a["key_end"][..., None])
    return ~visible[:, None, None]


def scores(a: Arguments) -> Tensor:
    """scale q k^T as the softmax sees it, hidden keys at the dtype's minimum, [B, K, R, L, S]."""
    q = wide(a["q"]).unflatten(2, (a["k"].shape[2], -1)) * a["scale"]
    s = torch.einsum("blkre,bske->bkrls", q, wide(a["k"]))
    return s.masked_fill(hidden_keys(a), torch.finfo(s.dtype).min)


def attend(weights: Weights) -> Function:
    """Attention with these probabilities; heads of a group follow one another."""

    def kernel(**a: Any) -> Tensor:
        p = weights(scores(a), hidden_keys(a))
        return torch.einsum("bkrls,bske->blkre", p, wide(a["v"])).flatten(2, 3).to(a["q"].dtype)

    return kernel


def softmax(
    exp: Callable[[Tensor], Tensor] = torch.exp,
    total: Callable[[Tensor], Tensor] = lambda e: e.sum(-1, keepdim=True),
    rounding: Callable[[Tensor], Tensor] = lambda x: x,
) -> Weights:
    """exp(s - max) / total(exp(s - max)), scores and result passed through `rounding`."""

    def weights(s: Tensor, hidden: Tensor) -> Tensor:
        s = rounding(s.clamp(min=-3e4))
        e = exp(s - s.amax(-1, keepdim=True)).masked_fill(hidden, 0.0)
        return rounding(e / total(e).clamp(min=1e-30))

    return weights


def low_total(rounding: Callable[[Tensor], Tensor], block: int) -> Callable[[Tensor], Tensor]:
    """The denominator summed in blocks of keys, the running sum rounded after each."""

    def total(e: Tensor) -> Tensor:
        running = torch.zeros_like(e[..., :1])
        for part in e.split(block, -1):
            running = rounding(running + part.sum(-1, keepdim=True))
        return running

    return total


def unscaled_blocks(block: int) -> Weights:
    """Online softmax that does not rescale what it has summed when the running maximum rises."""

    def weights(s: Tensor, hidden: Tensor) -> Tensor:
        running, parts = torch.full_like(s[..., :1], torch.finfo(s.dtype).min), []
        for part in s.split(block, -1):
            running = torch.maximum(running, part.amax(-1, keepdim=True).detach())
            parts.append(torch.exp(part - running))
        e = torch.cat(parts, -1).masked_fill(hidden, 0.0)
        return e / e.sum(-1, keepdim=True).clamp(min=1e-30)

    return weights


def previous_layer(a: Arguments) -> float:
    """The scale that results when the softmax multiplies by the previous layer's number (1 in the
    first)."""
    layer: float = a["layer_scale"]
    return float(a["scale"]) * max(layer - 1, 1.0) / layer


def one_more_key(a: Arguments) -> Tensor:
    """key_end with one key too many."""
    return (a["key_end"] + 1).clamp(max=a["k"].shape[1])


def causal_end(a: Arguments) -> Tensor:
    """key_end as if the prefix were causal."""
    i = torch.arange(a["q"].shape[1], dtype=torch.int32)
    return torch.minimum(a["key_end"], i + 1)


def without_last_key(a: Arguments) -> Tensor:
    """key_end without the last key where the keys do not fill blocks of 16."""
    keys = a["k"].shape[1]
    return a["key_end"] if keys % 16 == 0 else a["key_end"].clamp(max=keys - 1)


def leaking_head(**a: Any) -> Tensor:
    """Head 0 sees one key too many."""
    leak = reference(**a | {"key_end": one_more_key(a)})
    return torch.cat((leak[:, :, :1], reference(**a)[:, :, 1:]), 2)


def leaking_key(**a: Any) -> Tensor:
    """Every query sees key 0, whatever its key_start."""
    hidden = hidden_keys(a)
    hidden[..., 0] = False
    open_scores = scores(a | {"key_start": torch.zeros_like(a["key_start"])})
    s = torch.where(hidden, torch.finfo(open_scores.dtype).min, open_scores)
    p = torch.softmax(s, -1).masked_fill(hidden, 0.0)
    return torch.einsum("bkrls,bske->blkre", p, wide(a["v"])).flatten(2, 3).to(a["q"].dtype)


def interleaved_groups(**a: Any) -> Tensor:
    """Head h reads kv head h mod K instead of h div R."""
    order = torch.argsort(torch.arange(a["q"].shape[2]) % a["k"].shape[2], stable=True)
    y = reference(**a | {"q": a["q"][:, :, order]})
    return y[:, :, torch.argsort(order)]


def first_head_only(name: str) -> Function:
    """Only the first head of each group sends a gradient to `name` (k or v)."""

    def kernel(**a: Any) -> Tensor:
        heads = torch.arange(a["q"].shape[2])
        first = heads % (a["q"].shape[2] // a["k"].shape[2]) == 0
        fixed = reference(**a | {name: a[name].detach()})
        return torch.where(first[:, None], reference(**a), fixed)

    return kernel


def last_query_lost(**a: Any) -> Tensor:
    """The last query sends no gradient to v."""
    fixed = reference(**a | {"v": a["v"].detach()})
    return torch.cat((reference(**a)[:, :-1], fixed[:, -1:]), 1)


def scaled_gradient(name: str, factor: float) -> Vjp:
    """The right gradients, that of `name` multiplied by `factor` before it is rounded."""
    right = vjp(ops.attention, reference)

    def gradients(a: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
        up = a | {n: wide(a[n]) for n in "qkv"}
        found = right(up, (wide(outputs[0]),))
        factors = {name: factor}
        return {
            n: (g * factors.get(n, 1.0)).to(a[n].dtype) for n, g in found.items() if g is not None
        }

    return gradients


def flash_backward(row_term: Callable[[Tensor, Tensor], Tensor]) -> Vjp:
    """The backward in closed form: dS = P (dO v^T - row_term(dO, O)) with O the result as the
    forward stores it and row_term the sum over E of dO O (Dao et al. 2022, algorithm 4, line
    19)."""

    def gradients(a: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
        s, hidden, groups = scores(a), hidden_keys(a), a["k"].shape[2]
        p = torch.softmax(s, -1).masked_fill(hidden, 0.0)
        o = torch.einsum("bkrls,bske->blkre", p, wide(a["v"])).to(a["q"].dtype)
        do = wide(outputs[0]).unflatten(2, (groups, -1))  # [B, L, K, R, E]
        d = row_term(do, wide(o)).permute(0, 2, 3, 1, 4)  # [B, K, R, L, 1]
        ds = p * (torch.einsum("blkre,bske->bkrls", do, wide(a["v"])) - d) * a["scale"]
        q = wide(a["q"]).unflatten(2, (groups, -1))
        found = {
            "q": torch.einsum("bkrls,bske->blkre", ds, wide(a["k"])).flatten(2, 3),
            "k": torch.einsum("bkrls,blkre->bske", ds, q),
            "v": torch.einsum("bkrls,blkre->bske", p, do),
        }
        return {n: g.to(a[n].dtype) for n, g in found.items()}

    return gradients


def low_row_term(do: Tensor, o: Tensor) -> Tensor:
    """The row sum from a result rounded to bfloat16."""
    return (do * o.bfloat16().float()).sum(-1, keepdim=True)


def no_row_term(do: Tensor, o: Tensor) -> Tensor:
    """Zero."""
    return torch.zeros_like(do[..., :1])
