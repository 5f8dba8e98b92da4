"""Declares the wrong and benign kernels of the rotation.
Shapes: B batch, L sequence, H heads, E head dim, G sections, P pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glm_core.faults.fault import ONLY_FLOAT32, benign, fault, mutant, planted
from glm_core.faults.kernels import Arguments, Function, backward_only, changed, pulled_argument
from glm_core.faults.rounding import Edit, bf16, double, precise
from glm_core.ops import rope


def tables(change: Edit) -> Function:
    """Returns the reference with both tables changed."""
    return changed(rope, cos=lambda a: change(a["cos"]), sin=lambda a: change(a["sin"]))


def one_frequency(table: Edit) -> Callable[[Arguments], Tensor]:
    """Returns cos or sin with the angle of pair 1 too large by 1 % (of its part within a turn)."""

    def make(a: Arguments) -> Tensor:
        angle = torch.atan2(a["sin"], a["cos"])
        angle[..., 1:2] *= 1.01
        return table(angle)

    return make


def last_rows_repeat(block: int) -> Edit:
    """Returns a change of a table: rows past the last whole block use the block's last row."""
    return lambda t: t[:, torch.arange(t.shape[1]).clamp(max=t.shape[1] // block * block - 1)]


def last_pair_unrotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    keep = torch.arange(cos.shape[-1]) == cos.shape[-1] - 1
    return rope.reference(x, cos.masked_fill(keep, 1.0), sin.masked_fill(keep, 0.0), interleaved)


def rotated(a: Arguments) -> Tensor:
    """Returns which dimensions of a head are rotated, [E]."""
    return torch.arange(a["x"].shape[-1]) < 2 * a["cos"].shape[-2] * a["cos"].shape[-1]


@mutant(rope, "pairs i with i + E/2 though only a part is rotated")
def pairs_across_head(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    pairs, half = cos.shape[-1], x.shape[-1] // 2
    if interleaved or cos.shape[-2] > 1 or half <= pairs:
        return rope.reference(x, cos, sin, interleaved)
    head = torch.cat((x[..., :pairs], x[..., half : half + pairs]), -1)
    turned = rope.reference(head, cos, sin, False)
    middle, tail = x[..., pairs:half], x[..., half + pairs :]
    return torch.cat((turned[..., :pairs], middle, turned[..., pairs:], tail), -1)


turned_back = changed(rope, sin=lambda a: -a["sin"])
fault(rope, "turns the other way", turned_back, mutant="sign_flipped")
fault(
    rope,
    "the backward turns forward, not back",
    backward_only(rope, turned_back),
    mutant="gradient_turned_forward",
    **planted("rope-gradient-wrong-way", "gradient", "backward"),
)
fault(
    rope,
    "cos and sin are exchanged",
    changed(rope, cos=lambda a: a["sin"], sin=lambda a: a["cos"]),
    mutant="tables_exchanged",
)
fault(
    rope,
    "always pairs i with i + P",
    changed(rope, interleaved=False),
    mutant="never_interleaved",
    **planted("rope-half-for-interleaved", "position", setup="glm4"),
)
fault(
    rope,
    "always pairs 2i with 2i + 1",
    changed(rope, interleaved=True),
    **planted("rope-interleaved-for-half", "position"),
)
fault(
    rope,
    "every position takes its neighbour's angle",
    tables(lambda t: t.roll(1, 1)),
    **planted("rope-off-by-one", "position"),
)
fault(
    rope,
    "the angle of pair 1 is too large by 1 %",
    changed(rope, cos=one_frequency(torch.cos), sin=one_frequency(torch.sin)),
    **planted("rope-one-frequency-1%", "position"),
)
fault(
    rope,
    "cos and sin are rounded to bfloat16",
    tables(bf16),
    **planted("rope-bfloat16-tables", "dtype", **ONLY_FLOAT32),
)
fault(
    rope,
    "the slowest pair stays as it is",
    last_pair_unrotated,
    **planted("rope-last-pair-unrotated", "position", setup="glm4"),
)
fault(
    rope,
    "rows past whole blocks of 16 use the last block's angles",
    tables(last_rows_repeat(16)),
    **planted("rope-last-rows-repeat", "rare shape", setup="glm4"),
)
fault(
    rope,
    "the second section turns by the first one's positions",
    tables(lambda t: t[..., :1, :].expand_as(t)),
    mutant="one_position_for_all",
)
fault(
    rope,
    "every row turns by the first row's positions",
    tables(lambda t: t[:1]),
    mutant="positions_of_first_row",
)
fault(
    rope,
    "dimensions past the rotated part become zero",
    lambda **a: rope.reference(**a) * rotated(a),
    mutant="rest_dropped",
)
fault(
    rope,
    "the backward leaves out the dimensions that are not rotated",
    pulled_argument(rope, "x", lambda a, g: g * rotated(a)),
    mutant="gradient_of_rest_lost",
)


def fused(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Computes a cos - b sin and b cos + a sin by one product and one fused multiply-add."""
    sections, pairs = cos.shape[-2:]
    rotated = 2 * sections * pairs
    shape, dim = ((pairs, 2), -1) if interleaved else ((2, pairs), -2)
    a, b = double(x[..., :rotated]).unflatten(-1, (sections, *shape)).unbind(dim)  # [B, L, H, G, P]
    c, s = cos.unsqueeze(2), sin.unsqueeze(2)
    rounded = torch.stack((-(b * s), a * s), dim).float()
    turned = (torch.stack((a * c, b * c), dim) + rounded.double()).float()  # one more rounding
    return torch.cat((turned.flatten(-3).to(x.dtype), x[..., rotated:]), -1)


benign("rope-float64", rope, "float64 inside", precise(rope))
benign("rope-fused-multiply-add", rope, "one rounding for a c - b s's second product", fused)
