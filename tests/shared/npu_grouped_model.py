"""A model of torch_npu's grouped matrix product in plain torch on the CPU, for one tensor on each
side: ops-transformer gmm/grouped_matmul/docs/aclnnGroupedMatmulV4.md.

Shapes: G groups; M, K, N of a product [M, K] x [K, N]."""

from __future__ import annotations

from typing import Any

import torch
from npu_model import one_dtype
from torch import Tensor

LIMIT, MOST_GROUPS = 65536, 1024


def npu_grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    group_list: Tensor,
    split_item: int,
    group_type: int,
    group_list_type: int,
    antiquant_scale: list[Tensor] | None,
    antiquant_offset: list[Tensor] | None,
    **rest: Any,
) -> list[Tensor]:
    """Returns one tensor: the rows of x [M, K] by group times weight [G, K, N] (type 0), or the
    columns of x [M, K], a transposed view, by group times the rows of weight [K, N] (type 2). A
    weight in int8 has scales and offsets [G, N] of the dtype of x, to which it is rounded."""
    (a,), (b,) = x, weight
    if antiquant_scale is not None:
        assert antiquant_offset is not None
        assert (b.dtype, group_type) == (torch.int8, 0)
        (scale,), (offset,) = antiquant_scale, antiquant_offset
        assert scale.shape == offset.shape == (len(b), b.shape[2])
        one_dtype(a, scale, offset)
        assert a.dtype != torch.float32
        made = (b.float() + offset[:, None].float()) * scale[:, None].float()
        b = made.to(a.dtype).mT.contiguous().mT if not b.is_contiguous() else made.to(a.dtype)
    dtype = one_dtype(a, b)
    assert not any(rest.values())
    assert (split_item, group_list_type) == (3, 0)
    assert group_list.dtype == torch.int64
    assert len(group_list) <= MOST_GROUPS
    assert max(*a.shape[1:], *b.shape[1:]) < LIMIT
    ends = group_list.tolist()
    assert ends == sorted(ends)
    assert ends[-1] == a.shape[0 if group_type == 0 else 1]
    starts = [0, *ends[:-1]]
    if group_type == 0:
        assert a.is_contiguous()
        assert b.is_contiguous() or b.transpose(1, 2).is_contiguous()
        assert len(b) == len(ends)
        pairs = [(a[i:j].float(), w.float()) for i, j, w in zip(starts, ends, b, strict=True)]
        return [torch.cat([p @ w for p, w in pairs]).to(dtype)]
    assert group_type == 2
    assert a.t().is_contiguous()
    assert b.is_contiguous()
    each = [a[:, i:j].float() @ b[i:j].float() for i, j in zip(starts, ends, strict=True)]
    empty = [i == j for i, j in zip(starts, ends, strict=True)]
    each = [y.fill_(torch.nan) if none else y for y, none in zip(each, empty, strict=True)]
    return [torch.stack(each).to(dtype)]
