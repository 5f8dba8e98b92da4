"""Wrong rotations. Shapes: B batch, L sequence, H heads, E head dim, G sections, P pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from glm_core.faults.mutant import mutant, pulled
from glm_core.ops import rope


@mutant(rope, wrong="turns the other way")
def sign_flipped(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    return rope.reference(x, cos, -sin, interleaved)


@mutant(rope, wrong="cos and sin exchanged")
def tables_exchanged(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    return rope.reference(x, sin, cos, interleaved)


@mutant(rope, wrong="always pairs i with i + P")
def never_interleaved(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    return rope.reference(x, cos, sin, False)


@mutant(rope, wrong="pairs i with i + E/2 though only a part is rotated")
def pairs_across_head(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    pairs, half = cos.shape[-1], x.shape[-1] // 2
    if interleaved or cos.shape[-2] > 1 or half <= pairs:
        return rope.reference(x, cos, sin, interleaved)
    head = torch.cat((x[..., :pairs], x[..., half : half + pairs]), -1)
    turned = rope.reference(head, cos, sin, False)
    middle, tail = x[..., pairs:half], x[..., half + pairs :]
    return torch.cat((turned[..., :pairs], middle, turned[..., pairs:], tail), -1)


@mutant(rope, wrong="dimensions past the rotated part become zero")
def rest_dropped(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    rotated = 2 * cos.shape[-2] * cos.shape[-1]
    kept = torch.arange(x.shape[-1], device=x.device) < rotated
    return rope.reference(x, cos, sin, interleaved) * kept


@mutant(rope, wrong="the second section turns by the first one's positions")
def one_position_for_all(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    first = [t[..., :1, :].expand_as(t) for t in (cos, sin)]
    return rope.reference(x, *first, interleaved)


@mutant(rope, wrong="every row turns by the first row's positions")
def positions_of_first_row(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    return rope.reference(x, cos[:1], sin[:1], interleaved)


@mutant(rope, wrong="backward turns forward, not back")
def gradient_turned_forward(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    back = rope.reference(x, cos, -sin, interleaved)
    y = rope.reference(x.detach(), cos, sin, interleaved)
    return y + (back - back.detach())


@mutant(rope, wrong="backward leaves out the dimensions that are not rotated")
def gradient_of_rest_lost(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    rotated = 2 * cos.shape[-2] * cos.shape[-1]
    kept = torch.arange(x.shape[-1], device=x.device) < rotated
    return rope.reference(pulled(x, lambda g: g * kept), cos, sin, interleaved)
