"""Cuts a linear layer into tiles (`deepspeed.runtime.zero.tiling`), which ZeRO 3 can gather one at
a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glm_core.deepspeed.runtime.pipe.partition import uniform
from glm_core.deepspeed.runtime.zero.partition_parameters import GatheredParameters
from glm_core.errors import GlmCoreError


class BadSplit(GlmCoreError, RuntimeError):
    """Tiles that a layer cannot be cut into; a RuntimeError, as in DeepSpeed."""


class TiledLinear(nn.Module):
    """An nn.Linear as out_splits x in_splits layers, `linears[out][in]`, whose results are summed
    over `in` and joined over `out`. The last tile of a row has the row's bias. `in_parts` and
    `out_parts` are the boundaries."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        in_splits: int = 1,
        out_splits: int = 1,
        input_is_already_split: bool = False,
        combine_out_splits: bool = True,
        linear_cls: Callable[..., nn.Module] = nn.Linear,
        init_linear: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """input_is_already_split: `forward` gets a list of in_splits tensors; combine_out_splits:
        False makes it return a list; init_linear: a layer whose values are taken; kwargs: of
        linear_cls. Raises BadSplit."""
        super().__init__()
        for name, splits, size in (
            ("in_splits", in_splits, in_features),
            ("out_splits", out_splits, out_features),
        ):
            if not 1 <= splits <= size:
                raise BadSplit(f"TiledLinear: {name}={splits}; use 1 to {size}")
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.in_splits, self.out_splits = in_splits, out_splits
        self.input_is_already_split = input_is_already_split
        self.combine_out_splits = combine_out_splits
        self.in_parts = uniform(in_features, in_splits)
        self.out_parts = uniform(out_features, out_splits)
        ins, outs = _sizes(self.in_parts), _sizes(self.out_parts)
        self.linears = nn.ModuleList(
            nn.ModuleList(
                linear_cls(wide, high, bias=bias and i == in_splits - 1, **kwargs)
                for i, wide in enumerate(ins)
            )
            for high in outs
        )
        if init_linear is not None:
            self.copy_params_from(init_linear)

    def forward(self, input_: Any) -> Any:
        """Returns the layer's result, or a list with that of each part of its features."""
        split = self.input_is_already_split and self.in_splits > 1  # one input needs no list
        inputs = input_ if split else input_.split(_sizes(self.in_parts), -1)
        if len(inputs) != self.in_splits:
            raise BadSplit(f"TiledLinear: {len(inputs)} inputs; pass in_splits={self.in_splits}")
        outputs = [
            self._sum([tile(x) for tile, x in zip(row, inputs, strict=True)])
            for row in self._rows()
        ]
        return self._join(outputs) if self.combine_out_splits else outputs

    def _sum(self, parts: Sequence[Any]) -> Any:
        return sum(parts[1:], parts[0])

    def _join(self, outputs: Sequence[Any]) -> Any:
        return torch.cat(list(outputs), dim=-1)

    @torch.no_grad()
    def copy_params_from(self, other: nn.Module) -> None:
        """Takes the values of a layer that is not cut. In ZeRO 3 a collective, with rank 0's."""
        weight, bias = other.get_parameter("weight"), getattr(other, "bias", None)
        if weight.shape != (self.out_features, self.in_features) or self.use_bias != (
            bias is not None
        ):
            raise BadSplit(
                f"TiledLinear: a layer of shape {tuple(weight.shape)} with bias={bias is not None} "
                f"for {self.out_features} x {self.in_features}, bias={self.use_bias}; pass its like"
            )
        for row, rows in zip(self._rows(), _slices(self.out_parts), strict=True):
            for tile, columns in zip(row, _slices(self.in_parts), strict=True):
                _copy(tile.get_parameter("weight"), weight[rows, columns])
            if bias is not None:
                _copy(row[-1].get_parameter("bias"), bias[rows])

    def _rows(self) -> list[list[nn.Module]]:
        return [list(row.children()) for row in self.linears]


class TiledLinearReturnBias(TiledLinear):
    """TiledLinear of a linear_cls that returns (result, bias), as Megatron-LM's do."""

    def _sum(self, parts: Sequence[Any]) -> Any:
        return super()._sum([result for result, _ in parts]), parts[-1][1]

    def _join(self, outputs: Sequence[Any]) -> Any:
        biases = [bias for _, bias in outputs if bias is not None]
        joined = super()._join([result for result, _ in outputs])
        return joined, super()._join(biases) if biases else None


def _sizes(bounds: Sequence[int]) -> list[int]:
    return [end - start for start, end in itertools.pairwise(bounds)]


def _slices(bounds: Sequence[int]) -> list[slice]:
    return [slice(start, end) for start, end in itertools.pairwise(bounds)]


def _copy(param: nn.Parameter, values: Tensor) -> None:
    with GatheredParameters(param, modifier_rank=0):
        param.copy_(values)
