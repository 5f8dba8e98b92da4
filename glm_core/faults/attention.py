"""Declares the wrong and benign kernels of attention.
Shapes: B batch, L queries, S keys, H heads, K kv heads, R = H/K heads per kv head, E head dim."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm_core.faults.fault import (
    BFLOAT16,
    FLOAT32,
    ONLY_FLOAT32,
    benign,
    fault,
    mutant,
    planted,
    stateful_fault,
)
from glm_core.faults.flash import (
    flash,
    flash_attention,
    flash_backward,
    hidden_keys,
    normalised,
    scores,
)
from glm_core.faults.kernels import (
    Arguments,
    Function,
    Gradients,
    Vjp,
    backward_only,
    changed,
    forward_only,
    pulled_argument,
    vjp,
    with_gradients,
)
from glm_core.faults.rounding import (
    Edit,
    Order,
    Sum,
    bf16,
    precise,
    reversed_order,
    rough_exp,
    row_sum,
    shuffled,
    through,
)
from glm_core.ops import attention
from glm_core.ops.precision import wide

F = torch.nn.functional
reference = attention.reference
Weights = Callable[[Tensor, Tensor], Tensor]
"""(scores, hidden) -> probabilities, both [B, K, R, L, S]; hidden broadcasts over K and R"""


def weighted(p: Tensor, a: Arguments) -> Tensor:
    """Returns the values weighted by the probabilities p [B, K, R, L, S] in q's dtype,
    [B, L, H, E]."""
    return torch.einsum("bkrls,bske->blkre", p, wide(a["v"])).flatten(2, 3).to(a["q"].dtype)


def attend(weights: Weights, late: bool = False) -> Function:
    """Returns attention with these probabilities."""
    return lambda **a: weighted(weights(scores(a, late), hidden_keys(a)), a)


# wrong values -------------------------------------------------------------------------


def softmax(exp: Edit = torch.exp, total: Sum = row_sum, rounding: Edit = lambda x: x) -> Weights:
    """Returns exp(s - max) / total(exp(s - max)), scores and result passed through `rounding`."""

    def weights(s: Tensor, hidden: Tensor) -> Tensor:
        s = rounding(s.clamp(min=-3e4))
        e = exp(s - s.amax(-1, keepdim=True)).masked_fill(hidden, 0.0)
        return rounding(normalised(e, total))

    return weights


def low_total(rounding: Edit, block: int) -> Sum:
    """Returns a sum over blocks of keys that rounds the running sum after each block."""

    def total(e: Tensor) -> Tensor:
        running = torch.zeros_like(e[..., :1])
        for part in e.split(block, -1):
            running = rounding(running + row_sum(part))
        return running

    return total


def unscaled_blocks(block: int) -> Weights:
    """Returns an online softmax that does not rescale earlier sums when the running maximum
    rises."""

    def weights(s: Tensor, hidden: Tensor) -> Tensor:
        running, parts = torch.full_like(s[..., :1], torch.finfo(s.dtype).min), []
        for part in s.split(block, -1):
            running = torch.maximum(running, part.amax(-1, keepdim=True).detach())
            parts.append(torch.exp(part - running))
        return normalised(torch.cat(parts, -1).masked_fill(hidden, 0.0))

    return weights


def previous_layer(a: Arguments) -> float:
    """Returns the scale that results when the softmax multiplies by the previous layer's number
    (1 in the first)."""
    layer: float = a["layer_scale"]
    return float(a["scale"]) * max(layer - 1, 1.0) / layer


def one_more_key(a: Arguments) -> Tensor:
    return (a["key_end"] + 1).clamp(max=a["k"].shape[1])


def causal_prefix(a: Arguments) -> Tensor:
    i = torch.arange(a["q"].shape[1], dtype=torch.int32)
    return torch.minimum(a["key_end"], i + 1)


def causal_end(a: Arguments) -> Tensor:
    queries, keys = a["q"].shape[1], a["k"].shape[1]
    ends = torch.arange(1, queries + 1, dtype=torch.int32) + keys - queries
    return ends.expand_as(a["key_end"])


def without_last_key(a: Arguments) -> Tensor:
    keys = a["k"].shape[1]
    return a["key_end"] if keys % 16 == 0 else a["key_end"].clamp(max=keys - 1)


def whole_tiles(tile: int) -> Callable[[Arguments], Tensor]:
    """Returns a key_end that drops keys past the last whole tile, where there is more than one
    tile."""

    def key_end(a: Arguments) -> Tensor:
        keys, ends = a["k"].shape[1], a["key_end"]
        return ends.clamp(max=keys // tile * tile) if keys > tile else ends

    return key_end


def leaking_head(**a: Any) -> Tensor:
    leak = reference(**a | {"key_end": one_more_key(a)})
    return torch.cat((leak[:, :, :1], reference(**a)[:, :, 1:]), 2)


def leaking_key(**a: Any) -> Tensor:
    hidden = hidden_keys(a)
    hidden[..., 0] = False
    open_scores = scores(a | {"key_start": torch.zeros_like(a["key_start"])})
    s = torch.where(hidden, torch.finfo(open_scores.dtype).min, open_scores)
    return weighted(torch.softmax(s, -1).masked_fill(hidden, 0.0), a)


def interleaved_groups(**a: Any) -> Tensor:
    order = torch.argsort(torch.arange(a["q"].shape[2]) % a["k"].shape[2], stable=True)
    y: Tensor = reference(**a | {"q": a["q"][:, :, order]})
    return y[:, :, torch.argsort(order)]


def stale_result(every: int) -> Function:
    """Returns a kernel that gives the previous call's result on every n-th call, if the shape is
    the same."""
    calls = 0
    last: Tensor | None = None

    def kernel(**a: Any) -> Tensor:
        nonlocal calls, last
        right: Tensor = reference(**a)
        calls, before, last = calls + 1, last, right.detach()
        if calls % every or before is None or before.shape != right.shape:
            return right
        return before

    return kernel


def is_empty(a: Arguments) -> Tensor:
    """Returns which queries see nothing, [B, L, 1, 1]."""
    return (a["key_end"] <= a["key_start"])[..., None, None]


@mutant(attention, "a query that sees nothing gets the mean of all values")
def empty_row_mean(**a: Any) -> Tensor:
    means = wide(a["v"]).mean(1, keepdim=True)  # [B, 1, K, E]
    means = means.repeat_interleave(a["q"].shape[2] // means.shape[2], 2)  # [B, 1, H, E]
    return torch.where(is_empty(a), means.to(a["q"].dtype), reference(**a))


@mutant(attention, "a query that sees nothing gets NaN")
def empty_row_nan(**a: Any) -> Tensor:
    return torch.where(is_empty(a), torch.nan, reference(**a))


@mutant(attention, "scores are rounded to the working dtype before the softmax")
def narrow_scores(**a: Any) -> Tensor:
    narrow = through(a["q"].dtype)
    return attend(lambda s, hidden: softmax()(narrow(s.clamp(min=-3e4)), hidden))(**a)


for percent, factor in (("0.1%", 1.001), ("0.01%", 1.0001)):
    fault(
        attention,
        f"scores are too large by {percent}",
        changed(attention, scale=lambda a, factor=factor: a["scale"] * factor),
        **planted(f"attention-scale-{percent}", "scale"),
    )
fault(
    attention,
    "the scale is E^-1/2 whatever was asked",
    changed(attention, scale=lambda a: a["q"].shape[-1] ** -0.5),
    mutant="scale_fixed",
)
fault(
    attention,
    "scores are divided by the layer scale and not multiplied back",
    changed(attention, scale=lambda a: a["scale"] / a["layer_scale"], layer_scale=1.0),
    mutant="layer_scale_half_applied",
)
fault(
    attention,
    "scores are multiplied back by the previous layer's scale",
    changed(attention, scale=previous_layer),
    **planted("attention-wrong-layer-scale", "scale"),
)
fault(
    attention,
    "PB-relax divides by a and does not multiply back",
    changed(attention, scale=lambda a: a["scale"] / (a["pb_relax"] or 1.0), pb_relax=0.0),
    mutant="relax_half_applied",
)
fault(
    attention,
    "one key too many is visible",
    changed(attention, key_end=one_more_key),
    mutant="end_inclusive",
    **planted("attention-one-key-too-many", "mask"),
)
fault(
    attention,
    "always causal: query i sees keys up to i",
    changed(attention, key_end=causal_end),
    mutant="always_causal",
)
fault(
    attention,
    "the prefix is causal",
    changed(attention, key_end=causal_prefix),
    **planted("attention-causal-prefix", "mask"),
)
fault(
    attention,
    "causal from key 0 though earlier keys are cached",
    changed(attention, key_end=lambda a: a["key_end"] - (a["k"].shape[1] - a["q"].shape[1])),
    mutant="cache_ignored",
)
fault(
    attention,
    "key_start is taken for 0: packed samples see each other",
    changed(attention, key_start=lambda a: torch.zeros_like(a["key_start"])),
    mutant="start_ignored",
    **planted("attention-packed-leak", "mask"),
)
fault(
    attention,
    "the first row's intervals serve the whole batch",
    changed(
        attention,
        key_start=lambda a: a["key_start"][:1].expand_as(a["key_start"]),
        key_end=lambda a: a["key_end"][:1].expand_as(a["key_end"]),
    ),
    mutant="intervals_of_first_row",
)
fault(
    attention,
    "key 0 is visible to every query",
    leaking_key,
    **planted("attention-leaking-key", "mask"),
)
fault(
    attention,
    "head 0 sees one key too many",
    leaking_head,
    **planted("attention-leaking-head", "mask"),
)
fault(
    attention,
    "the last key is unseen where keys do not fill blocks of 16",
    changed(attention, key_end=without_last_key),
    **planted("attention-last-key-lost", "rare shape", setup="glm4"),
)
fault(
    attention,
    "keys past the last whole tile of 16 are dropped",
    changed(attention, key_end=whole_tiles(16)),
    mutant="last_tile_dropped",
)
fault(
    attention,
    "keys past the last whole tile of 128 are dropped",
    changed(attention, key_end=whole_tiles(128)),
    mutant="last_large_tile_dropped",
)
fault(
    attention,
    "query head h reads kv head h mod K",
    interleaved_groups,
    mutant="heads_interleaved",
    **planted("attention-groups-interleaved", setup="glm4"),
)
fault(
    attention,
    "softmax without subtracting the maximum",
    attend(lambda s, hidden: normalised(s.exp().masked_fill(hidden, 0.0))),
    mutant="maximum_not_subtracted",
)
fault(
    attention,
    "online softmax keeps old sums when the maximum rises",
    attend(unscaled_blocks(16)),
    **planted("attention-blocks-not-rescaled"),
)
fault(
    attention,
    "scores and probabilities are bfloat16",
    attend(softmax(rounding=bf16)),
    **planted("attention-bfloat16-softmax", "dtype", **ONLY_FLOAT32),
)
fault(
    attention,
    "scores and probabilities are float16",
    attend(softmax(rounding=through(torch.float16))),
    **planted("attention-float16-scores", "dtype", **ONLY_FLOAT32),
)
fault(
    attention,
    "the softmax's sum is accumulated in bfloat16",
    attend(softmax(total=low_total(bf16, 4))),
    **planted("attention-bfloat16-denominator", "dtype"),
)
fault(
    attention,
    "exp with a relative error of 1e-4",
    attend(softmax(exp=rough_exp)),
    **planted("attention-rough-exp", **ONLY_FLOAT32),
)
stateful_fault(
    attention,
    "every seventh call returns the previous result",
    lambda: forward_only(attention, stale_result(7)),
    **planted("attention-stale-result", "stale", "forward"),
)


# wrong gradients ----------------------------------------------------------------------


def first_head_only(name: str) -> Function:
    """Returns a kernel in which only the first head of each group sends a gradient to `name` (k or
    v)."""

    def kernel(**a: Any) -> Tensor:
        heads = torch.arange(a["q"].shape[2])
        first = heads % (a["q"].shape[2] // a["k"].shape[2]) == 0
        fixed = reference(**a | {name: a[name].detach()})
        return torch.where(first[:, None], reference(**a), fixed)

    return backward_only(attention, kernel)


def last_query_lost(**a: Any) -> Tensor:
    """Detaches v for the last query."""
    fixed = reference(**a | {"v": a["v"].detach()})
    return torch.cat((reference(**a)[:, :-1], fixed[:, -1:]), 1)


def scaled_gradient(name: str, factor: float) -> Vjp:
    """Returns the right gradients, the one of `name` multiplied by `factor` before it is
    rounded."""
    right = vjp(attention, reference)

    def gradients(a: Arguments, outputs: tuple[Tensor, ...]) -> Gradients:
        grads = right(a | {n: wide(a[n]) for n in "qkv"}, (wide(outputs[0]),))
        factors = {name: factor}
        return {
            n: (g * factors.get(n, 1.0)).to(a[n].dtype) for n, g in grads.items() if g is not None
        }

    return gradients


fault(
    attention,
    "the gradient of k lacks the scale",
    pulled_argument(attention, "k", lambda a, g: g / a["scale"]),
    mutant="gradient_of_k_unscaled",
)
fault(
    attention,
    "the gradient of v comes from the first query head of each group only",
    first_head_only("v"),
    mutant="gradient_of_group_lost",
)
fault(
    attention,
    "the gradient of k comes from the first query head of each group only",
    first_head_only("k"),
    **planted("attention-dk-first-head", "gradient", "backward", setup="glm4"),
)
fault(
    attention,
    "the gradient of v misses the last query",
    backward_only(attention, last_query_lost),
    **planted("attention-dv-last-query-lost", "rows", "backward"),
)
fault(
    attention,
    "the gradient of q is too large by 0.1 %",
    with_gradients(attention, scaled_gradient("q", 1.001)),
    **planted("attention-dq-0.1%", "scale", "backward"),
)
fault(
    attention,
    "the backward of softmax lacks its row sum: ds = p dp",
    flash_backward(lambda do, o: torch.zeros_like(do[..., :1])),
    mutant="gradient_without_row_sum",
    **planted("attention-no-row-term", "gradient", "backward"),
)
fault(
    attention,
    "the backward of softmax takes the row sum from a bfloat16 result",
    flash_backward(lambda do, o: row_sum(do * o.bfloat16().float())),
    **planted("attention-bfloat16-row-term", "dtype", "backward", **ONLY_FLOAT32),
)


# benign -------------------------------------------------------------------------------


def ordered(order: Order) -> Function:
    """Returns attention whose scores sum over E in another order."""

    def kernel(**a: Any) -> Tensor:
        at = order(a["q"].shape[-1])
        y: Tensor = reference(**a | {n: a[n][..., at] for n in "qk"})
        return y

    return kernel


def native(up: Edit) -> Function:
    """Returns torch's scaled_dot_product_attention, its inputs passed through `up`."""

    def kernel(**a: Any) -> Tensor:
        repeats = a["q"].shape[2] // a["k"].shape[2]
        q = up(a["q"]).transpose(1, 2)  # [B, H, L, E]
        k, v = (up(a[n]).repeat_interleave(repeats, 2).transpose(1, 2) for n in "kv")
        y = F.scaled_dot_product_attention(q, k, v, ~hidden_keys(a)[:, 0], scale=a["scale"])
        return y.transpose(1, 2).contiguous().to(a["q"].dtype)  # [B, L, H, E]

    return kernel


def binary_softmax(s: Tensor, hidden: Tensor) -> Tensor:
    """Takes exp2 of scores times log2(e)."""
    t = s * math.log2(math.e)
    return normalised(torch.exp2(t - t.amax(-1, keepdim=True)).masked_fill(hidden, 0.0))


def softmax_without_max(s: Tensor, hidden: Tensor) -> Tensor:
    """Relies on the scores of these models, which stay far below exp's overflow at 88."""
    return normalised(torch.exp(s.clamp(max=80.0)).masked_fill(hidden, 0.0))


def padded_keys(number: int) -> Function:
    """Returns attention over keys and values with rows in front that no query sees."""

    def kernel(**a: Any) -> Tensor:
        more = {n: F.pad(a[n], (0, 0, 0, 0, number, 0)) for n in "kv"}
        moved = {n: a[n] + number for n in ("key_start", "key_end")}
        return reference(**a | more | moved)

    return kernel


def query_blocks(size: int) -> Function:
    """Returns attention computed block of queries by block, over which the gradients of k and v are
    summed."""

    def kernel(**a: Any) -> Tensor:
        names, length = ("q", "key_start", "key_end"), a["q"].shape[1]
        cuts = range(0, length, size)
        return torch.cat(
            [reference(**a | {n: a[n][:, at : at + size] for n in names}) for at in cuts], 1
        )

    return kernel


def benign_attention(name: str, description: str, kernel: Function, **rest: Any) -> None:
    """Declares a change of attention."""
    benign(f"attention-{name}", attention, description, kernel, **rest)


benign_attention("permuted", "sum over E in a random order", ordered(shuffled))
benign_attention("reversed", "sum over E from the end", ordered(reversed_order))
benign_attention("float64", "float64 inside", precise(attention))
for n in (16, 32, 64):
    benign_attention(f"flash-{n}", f"online softmax, blocks of {n} keys", flash(n, False))
benign_attention(
    "flash-32-rounded",
    "online softmax, probabilities in the working dtype",
    flash(32, True),
    dtypes=BFLOAT16,
)
benign_attention("native", "torch's kernel in the working dtype", native(lambda t: t))
benign_attention("native-float32", "torch's kernel in float32", native(wide))
benign_attention("exp2", "base 2", attend(binary_softmax))
benign_attention(
    "no-maximum", "exp without the maximum", attend(softmax_without_max), ordinary=True
)
benign_attention("late-scale", "scaled after the product", attend(binary_softmax, late=True))
benign_attention(
    "padded-keys",
    "five keys before the first that nobody sees",
    padded_keys(5),
    dtypes=FLOAT32,
    by_library=True,
)
benign_attention("query-blocks-16", "queries in blocks of 16", query_blocks(16))
benign_attention(
    "flash-backward", "closed-form backward, row term from the stored result", flash_backward()
)
benign_attention(
    "flash-rounded",
    "flash attention whose products all read the working dtype",
    flash_attention(16, True),
    dtypes=BFLOAT16,
)
benign_attention(
    "flash-32-grouped", "online softmax with grouped heads", flash(32, False), setup="glm4"
)
benign_attention(
    "native-pb-relax", "torch's kernel in place of PB-relax", native(wide), setup="glm"
)
