"""Exports an op's reference to an ONNX model: forward, vector-Jacobian product or in-place update.

Shapes are static, as accelerators' providers want them. The shape arithmetic of dynamic shapes
would run on ONNX Runtime's CPU provider: a silent fallback, which this backend rules out."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.nn.attention import SDPBackend, sdpa_kernel

from glm_core.backends.onnxrt.call import (
    SEPARATOR,
    BranchesOnNumberError,
    Call,
    positions,
    unflatten,
)
from glm_core.backends.onnxrt.graph import Graph, Number, Value, facts
from glm_core.backends.onnxrt.translate import translate
from glm_core.errors import UnsupportedOpError

Traced = Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], list[Tensor]]
"""(tensors, numbers, cotangents) -> results"""


@functools.cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """Returns the decompositions into core ATen, and of operators that would only lengthen the
    translation table."""
    aten = torch.ops.aten
    more = [
        aten.addmm,
        aten.baddbmm,
        aten.native_layer_norm,
        aten.native_group_norm,
        aten.softplus,
        aten.elu,
        aten.leaky_relu,
    ]
    return {**core_aten_decompositions(), **get_decompositions(more)}


def export(call: Call) -> bytes:
    """Returns the plan (one line of JSON) and the serialised model, whose inputs are t<i> (tensor
    i), g<i> (gradient of result i) and n<i>_<dtype> (number i). Raises UnsupportedOpError where the
    reference cannot be traced or translated."""
    try:
        traced, names = trace(call)
    except GuardOnDataDependentSymNode as error:
        raise BranchesOnNumberError(f"{call.op.name} branches on a number: {error}") from error
    except Exception as error:  # whatever a foreign reference raises is the reason
        if isinstance(error, UnsupportedOpError):
            raise
        fact = str(error).strip().splitlines() or [type(error).__name__]
        raise UnsupportedOpError(f"{call.direction} cannot be traced: {fact[0]}") from error
    return build(traced, names)


def trace(call: Call) -> tuple[GraphModule, list[str]]:
    """Traces the call as an ATen program over flat inputs; returns it with the inputs' names."""
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True):
        tensors = [torch.empty(shape, dtype=dtype) for dtype, shape in call.tensors]
        names = [f"t{i}" for i in range(len(tensors))]
        numbers: list[Any] = list(call.numbers or ())
        symbols = [] if call.numbers is not None else _symbols(shapes, call.layout)
        names += [f"n{i}" for i in range(len(symbols))]
        function = {"forward": forward, "vjp": vjp, "update": update}[call.direction](call)
        cotangents: list[Tensor] = []
        if call.direction == "vjp":
            results = forward(call)(tensors, numbers, ())
            cotangents = [torch.empty_like(r) for r in results if r.is_floating_point()]
            names += [f"g{i}" for i in range(len(cotangents))]
        split = len(tensors), len(tensors) + len(symbols)

        def flat(*inputs: Any) -> list[Tensor]:
            values = inputs[split[0] : split[1]] if symbols else numbers
            return function(inputs[: split[0]], values, inputs[split[1] :])

        pure = torch.func.functionalize(flat)  # an update's in-place writes become results
        trace = make_fx(pure, decomposition_table=decompositions(), tracing_mode="real")
        with sdpa_kernel(SDPBackend.MATH):  # torch's fused attentions have no decomposition
            return trace(*tensors, *symbols, *cotangents), names


def _symbols(shapes: ShapeEnv, layout: str) -> list[Any]:
    with shapes.ignore_fresh_unbacked_symbols():  # inputs, not results of an op
        return [shapes.create_unbacked_symfloat() for k in layout.split(SEPARATOR) if k == "N"]


def outcomes(result: Any) -> list[Tensor]:
    """Returns a reference's result as a flat list. Raises UnsupportedOpError unless it is a tensor,
    several tensors, or None."""
    if result is None:
        return []
    flat = [result] if isinstance(result, Tensor) else result
    several = isinstance(flat, (tuple, list)) and (flat is not result or len(flat) > 1)
    if not several or not all(isinstance(x, Tensor) for x in flat):
        raise UnsupportedOpError("cannot export a result that is not a tensor or several of them")
    return list(flat)


def forward(call: Call) -> Traced:
    return lambda t, n, g: outcomes(call.op.reference(*unflatten(call.layout, t, n)))


def vjp(call: Call) -> Traced:
    """Returns the function that maps the gradients of the floating results to the gradients of the
    differentiable tensors, in their order."""
    chosen = positions(call.op, call.layout, call.op.differentiable)

    def function(t: Sequence[Any], n: Sequence[Any], g: Sequence[Any]) -> list[Tensor]:
        def of_chosen(*values: Tensor) -> list[Tensor]:
            placed = dict(zip(chosen, values, strict=True))
            results = forward(call)([placed.get(i, x) for i, x in enumerate(t)], n, ())
            return [r for r in results if r.is_floating_point()]

        pullback = torch.func.vjp(of_chosen, *(t[i] for i in chosen))[1]
        return list(pullback(list(g)))

    return function


def update(call: Call) -> Traced:
    """Returns the function that computes the new values of the tensors the op writes in place."""
    written = positions(call.op, call.layout, call.op.mutates)

    def function(t: Sequence[Any], n: Sequence[Any], g: Sequence[Any]) -> list[Tensor]:
        if call.op.reference(*unflatten(call.layout, t, n)) is not None:
            raise UnsupportedOpError("cannot export an in-place op that also returns something")
        return [t[i] for i in written]

    return function


def build(traced: GraphModule, names: list[str]) -> bytes:
    """Builds the ONNX model of an ATen program. Arithmetic on Python numbers stays out of the
    model: the plan lists it under `numbers`, to be done in Python's floats as the reference does,
    since 1 - 0.999 in float32 is off by 1e-5."""
    graph, program = Graph(), [n for n in names if n.startswith("n")]
    steps: list[list[Any]] = []
    known: dict[Node, Any] = {}
    inputs = iter(names)
    needed = _needed(traced)

    def number(node: Node) -> Number:
        function: Any = node.target
        arguments = [["#", known[a].position] if isinstance(a, Node) else a for a in node.args]
        steps.append([function.__name__, arguments])
        return Number(len(program) + len(steps) - 1)

    def compute(node: Node) -> Any:
        value: Any = node.meta.get("val")
        if node.op == "placeholder":
            name = next(inputs)
            if isinstance(value, Tensor):
                used = graph.input(name, value) if node in needed else f"unused_{name}"
                return Value(used, value)
            return Number(int(name[1:]))
        if node.op == "get_attr":
            constant = getattr(traced, str(node.target))
            return Value(graph.constant(constant), constant)
        if isinstance(value, (torch.SymFloat, torch.SymInt)):
            return number(node)
        if _has_empty_inputs(node):
            return Value(graph.constant(_evaluated(node)), value)
        if node.target is operator.getitem:
            return known[node.all_input_nodes[0]][node.args[1]]
        operator_called: Any = node.target
        if operator_called._schema.is_mutable and not _private(node.all_input_nodes[0]):
            raise UnsupportedOpError(f"{node.target} writes to a tensor that others may read")
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        return translate(graph, node.target, args, kwargs, value)

    for node in traced.graph.nodes:
        if node.op != "output" and (node in needed or node.op == "placeholder"):
            known[node] = compute(node)
    names = [graph.output(known[r]) if r in needed else "" for r in _results(traced)]
    graph.sweep()
    fakes = [r.meta["val"] for r in _results(traced)]
    plan = {
        "inputs": [[n, int(n[1:].partition("_")[0]), *f] for n, f in graph.inputs.items()],
        "results": [[n, i, *facts(x)] for i, (n, x) in enumerate(zip(names, fakes, strict=True))],
        "numbers": steps,
    }
    return json.dumps(plan).encode() + b"\n" + (graph.model() if graph.outputs else b"")


def _results(traced: GraphModule) -> list[Node]:
    return list(traced.graph.output_node().args[0])  # type: ignore[arg-type]  # make_fx returns a list


def _needed(traced: GraphModule) -> set[Node]:
    """Returns the nodes that non-empty results depend on. `functionalize` leaves write-backs behind
    that nothing reads, and OpenVINO takes no empty tensors."""
    todo = [r for r in _results(traced) if r.meta["val"].numel()]
    needed: set[Node] = set()
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo.extend([] if _has_empty_inputs(node) else node.all_input_nodes)
    return needed


def _private(node: Node) -> bool:
    """Returns whether only one user can see this tensor; a write to it then is just a new value.
    `functionalize` has removed the reference's writes, but some decompositions add their own."""
    target: Any = node.target
    fresh = node.op == "call_function" and not any(r.alias_info for r in target._schema.returns)
    return fresh and len(node.users) == 1


def _has_empty_inputs(node: Node) -> bool:
    """Returns whether all inputs are tensors without elements, as of an empty sum: the result is a
    constant."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    inputs: list[Any] = [n.meta.get("val") for n in node.all_input_nodes]
    plain = all(isinstance(x, Tensor) for x in (*inputs, node.meta.get("val")))
    return bool(inputs) and plain and not any(x.numel() for x in inputs)


def _evaluated(node: Node) -> Tensor:
    def real(n: Node) -> Tensor:
        return torch.empty(n.meta["val"].shape, dtype=n.meta["val"].dtype)

    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), real)
    function: Any = node.target
    result: Tensor = function(*args, **kwargs)
    return result
