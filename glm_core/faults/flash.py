"""Computes attention as flash kernels do (Dao et al. 2022): an online softmax over blocks of keys,
and a backward that forms the probabilities again.
Shapes: B batch, L queries, S keys, H heads, K kv heads, R = H/K heads per kv head, E head dim, C
that of the values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm_core.faults.kernels import Arguments, Function, Gradients, splice
from glm_core.faults.rounding import Edit, Sum, row_sum, through
from glm_core.ops import attention
from glm_core.ops.precision import wide


def hidden_keys(a: Arguments) -> Tensor:
    """Returns which keys a query must not see, [B, 1, 1, L, S]."""
    j = torch.arange(a["k"].shape[1])
    visible = (j >= a["key_start"][..., None]) & (j < a["key_end"][..., None])  # [B, L, S]
    return ~visible[:, None, None]


def scores(a: Arguments, late: bool = False) -> Tensor:
    """Returns scale q k^T, hidden keys at the dtype's minimum, [B, K, R, L, S]; `late` multiplies
    by the scale after the product."""
    before, after = (1.0, a["scale"]) if late else (a["scale"], 1.0)
    q = wide(a["q"]).unflatten(2, (a["k"].shape[2], -1)) * before  # [B, L, K, R, E]
    s = torch.einsum("blkre,bske->bkrls", q, wide(a["k"])) * after
    return s.masked_fill(hidden_keys(a), torch.finfo(s.dtype).min)


def normalised(e: Tensor, total: Sum = row_sum) -> Tensor:
    """Returns e / total(e), zeros where a query sees nothing."""
    return e / total(e).clamp(min=1e-30)


def flash(block: int, rounding: bool) -> Function:
    """Returns an online softmax over blocks of keys, normalised at the end (Dao et al. 2022,
    algorithm 1); with `rounding` the unnormalised probabilities are rounded to the working dtype
    for the product with v."""

    def kernel(**a: Any) -> Tensor:
        q, k, v = a["q"], wide(a["k"]), wide(a["v"])
        qs = wide(q).unflatten(2, (k.shape[2], -1)) * a["scale"]  # [B, L, K, R, E]
        hidden = hidden_keys(a)
        m = torch.full_like(qs[..., :1], -1e30).permute(0, 2, 3, 1, 4)  # [B, K, R, L, 1]
        total = torch.zeros_like(m)
        out = m.new_zeros((*m.shape[:-1], v.shape[-1]))  # [B, K, R, L, C]
        for at in range(0, k.shape[1], block):
            part, unseen = slice(at, at + block), hidden[..., at : at + block]
            s = torch.einsum("blkre,bske->bkrls", qs, k[:, part]).masked_fill(unseen, -1e30)
            new = torch.maximum(m, s.amax(-1, keepdim=True).detach())
            p = torch.exp(s - new).masked_fill(unseen, 0.0)
            rescale, m = torch.exp(m - new), new
            total = total * rescale + row_sum(p)
            p = p.to(q.dtype).float() if rounding else p
            out = out * rescale + torch.einsum("bkrls,bske->bkrle", p, v[:, part])
        y = normalised(out, lambda _: total).permute(0, 3, 1, 2, 4)  # [B, L, K, R, E]
        return y.flatten(2, 3).contiguous().to(q.dtype)  # [B, L, H, C]

    return kernel


RowTerm = Callable[[Tensor, Tensor], Tensor]
"""(dO, O), both [B, L, K, R, E] in float32 -> [B, L, K, R, 1]"""


def exact_row_term(do: Tensor, o: Tensor) -> Tensor:
    return row_sum(do * o)


def flash_backward(
    row_term: RowTerm = exact_row_term,
    forward: Function = attention.reference,
    rounding: bool = False,
) -> Function:
    """Returns a kernel with the value of `forward` and the backward in closed form, dS = P (dO v^T
    - row_term(dO, O)). P is formed again from the logarithm of the softmax's sum, and O is the
    result as `forward` stores it (Dao et al. 2022, algorithm 4). With `rounding` P and dS are
    rounded to the working dtype for their products, as tensor cores need them."""

    def gradients(a: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
        s, groups = scores(a), a["k"].shape[2]
        p = torch.exp(s - s.logsumexp(-1, keepdim=True)).masked_fill(hidden_keys(a), 0.0)
        o, do = (wide(x).unflatten(2, (groups, -1)) for x in (forward(**a), outputs[0]))
        d = row_term(do, o).permute(0, 2, 3, 1, 4)  # [B, K, R, L, 1]
        ds = p * (torch.einsum("blkre,bske->bkrls", do, wide(a["v"])) - d)
        stored: Edit = through(a["q"].dtype) if rounding else lambda x: x
        p, ds = stored(p), stored(ds)
        q = wide(a["q"]).unflatten(2, (groups, -1)) * a["scale"]  # [B, L, K, R, E]
        grads = {
            "q": torch.einsum("bkrls,bske->blkre", ds, wide(a["k"]) * a["scale"]).flatten(2, 3),
            "k": torch.einsum("bkrls,blkre->bske", ds, q),
            "v": torch.einsum("bkrls,blkre->bske", p, do),
        }
        return {n: g.to(a[n].dtype) for n, g in grads.items()}

    return splice(attention, forward, gradients)


def stored_elsewhere(seed: int) -> Function:
    """Returns a flash kernel whose backward reads its result as if each element had been rounded by
    half a step of the working dtype, up or down at random. A result may be exact by luck: where a
    query sees one key it is the key's value, and a row term taken from it cancels."""
    generator = torch.Generator().manual_seed(seed)

    def kernel(**a: Any) -> Tensor:
        eps = torch.finfo(a["q"].dtype).eps

        def row_term(do: Tensor, o: Tensor) -> Tensor:
            up = torch.randint(0, 2, o.shape, generator=generator) * 2 - 1
            return row_sum(do * o * (1 + up * (eps / 2)))

        return flash_backward(row_term, rounding=True)(**a)

    return kernel


def flash_attention(block: int, rounding: bool) -> Function:
    """Returns a whole flash kernel, forward and backward, over blocks of this many keys; with
    `rounding` the operands of all products are in the working dtype."""
    return flash_backward(forward=flash(block, rounding), rounding=rounding)
