"""Translates ATen calls to ONNX, with one short function for each operator that the core
decompositions leave: those that compute are in arithmetic.py and integers.py, those that only move
values in moves.py. docs/adr/0005 says why torch.onnx.export is not used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glm_core.backends.onnxrt import arithmetic, integers, moves
from glm_core.backends.onnxrt.graph import Graph, Value
from glm_core.errors import UnsupportedOpError


def translate(
    graph: Graph, target: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any
) -> Any:
    """Adds one ATen call to the graph; `out` is its fake result. Raises UnsupportedOpError for an
    operator without a translation."""
    # an in-place operator is translated as its functional form: see export._private
    name = target._schema.name.removeprefix("aten::")
    name = name.removesuffix("_") if target._schema.is_mutable else name
    function = moves.TABLE.get(name) or integers.TABLE.get(name) or arithmetic.TABLE.get(name)
    if function is None:
        raise UnsupportedOpError(
            f"{target} has no ONNX translation; add one to onnxrt/arithmetic.py or moves.py"
        )
    bound = {
        a.name: args[i] if i < len(args) else kwargs.get(a.name, a.default_value)
        for i, a in enumerate(target._schema.arguments)
    }
    result = function(graph, out, **bound)
    if isinstance(result, list):
        return [Value(r, o) for r, o in zip(result, out, strict=True)]
    if name in arithmetic.TABLE and out.dtype.is_floating_point:
        result = graph.rounded(result, out.dtype)
    return Value(result, out)
