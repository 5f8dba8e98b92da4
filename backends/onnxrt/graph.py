"""Builds an ONNX graph; decides which dtype a value has inside it and where it is rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from glm_core.backends.onnxrt.call import ELEMENT, SCALAR
from glm_core.errors import UnsupportedOpError

OPSET = 18  # the oldest with reduction axes as inputs; older opsets run on more providers
CONTRIB = "com.microsoft"
"""domain of the operators that ONNX Runtime adds to ONNX"""
HALF = (torch.float16, torch.bfloat16)


class Value(NamedTuple):
    """A tensor of the traced program: its name in the ONNX graph, and torch's shape and dtype."""

    name: str
    fake: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.fake.dtype

    @property
    def shape(self) -> list[int]:
        return list(self.fake.shape)


class Number(NamedTuple):
    """A Python number that is known only when the graph runs."""

    position: int


Operand = Value | Number | bool | int | float
Translation = Callable[..., Any]
"""(graph, out, **arguments by ATen's names) -> name of the result, or several"""


class Table(dict[str, Translation]):
    """Translations by ATen's operator name without overload."""

    def translation(self, *names: str) -> Callable[[Translation], Translation]:
        """Returns a decorator that enters a translation under these names."""

        def register(function: Translation) -> Translation:
            self.update(dict.fromkeys(names, function))
            return function

        return register


def refuse(what: str) -> UnsupportedOpError:
    """Returns the error for arguments that a translation does not cover."""
    return UnsupportedOpError(f"{what} has no ONNX translation; write the reference without it")


def inside(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that a value has inside the graph. float16 and bfloat16 values are held
    exactly in float32, because no CPU provider computes in them. They are rounded after every
    arithmetic node, as in torch's own ops."""
    return torch.float32 if dtype in HALF else dtype


class Graph:
    """A graph under construction; methods that add a value return its name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: dict[str, tuple[list[int], str]] = {}
        self.outputs: dict[tuple[str, torch.dtype], str] = {}
        """(value, its dtype outside the graph) -> its name as an output"""
        self.declared: list[onnx.ValueInfoProto] = []
        self.initializers: dict[bytes, onnx.TensorProto] = {}

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds an ONNX node with one output."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def several(self, kind: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """Adds an ONNX node with `count` outputs; returns their names."""
        names = [f"v{len(self.nodes)}_{i}" for i in range(count)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names

    def constant(self, value: Tensor) -> str:
        """Adds an initializer; equal ones are stored once."""
        array = value.detach().to(inside(value.dtype)).contiguous().numpy()
        key = f"{array.dtype}{array.shape}".encode() + array.tobytes()
        name = f"c{len(self.initializers)}"
        return str(self.initializers.setdefault(key, numpy_helper.from_array(array, name)).name)

    def ints(self, values: Sequence[int]) -> str:
        """Adds a constant list of integers: a shape, axes or the like."""
        return self.constant(torch.tensor(list(values), dtype=torch.int64))

    def input(self, name: str, like: Tensor) -> str:
        """Returns a graph input, declared at its first use; half floats are cast to float32 after
        it."""
        half = like.dtype in HALF
        if name not in self.inputs:
            self.inputs[name] = facts(like)
            if half:
                wide = helper.make_node("Cast", [name], [f"{name}_wide"], to=TensorProto.FLOAT)
                self.nodes.append(wide)
        return f"{name}_wide" if half else name

    def operand(self, x: Operand, dtype: torch.dtype) -> str:
        """Returns `x` as a value of the dtype that stands for `dtype` inside the graph."""
        dtype = inside(dtype)
        if isinstance(x, Value):
            return x.name if inside(x.dtype) == dtype else self.cast(x.name, dtype)
        if isinstance(x, Number):
            like = torch.empty((), dtype=dtype)
            return self.input(f"n{x.position}_{facts(like)[1]}", like)
        return self.constant(torch.tensor(x, dtype=dtype))

    def cast(self, name: str, dtype: torch.dtype) -> str:
        return self.node("Cast", name, to=ELEMENT[dtype])

    def rounded(self, name: str, dtype: torch.dtype) -> str:
        """Rounds to values that `dtype` can hold; the result keeps the dtype used inside the
        graph."""
        return self.cast(self.cast(name, dtype), torch.float32) if dtype in HALF else name

    def reshape(self, name: str, shape: Sequence[int]) -> str:
        return self.node("Reshape", name, self.ints(shape or SCALAR), allowzero=1)

    def expand(self, name: str, shape: Sequence[int]) -> str:
        return self.node("Expand", name, self.ints(shape or SCALAR))

    def slice(self, name: str, axis: int, start: int, end: int, step: int = 1) -> str:
        return self.node("Slice", name, *(self.ints([x]) for x in (start, end, axis, step)))

    def output(self, value: Value) -> str:
        """Makes the value an output of the graph, in its own dtype. A value asked for twice is one
        output: OpenVINO mixes up the outputs of graphs that have a value twice."""
        key = value.name, value.dtype
        if key in self.outputs:
            return self.outputs[key]
        name = self.outputs[key] = f"o{len(self.outputs)}"
        self.declared.append(_declaration(name, facts(value.fake)))
        if value.dtype in HALF:
            last = helper.make_node("Cast", [value.name], [name], to=ELEMENT[value.dtype])
        else:
            last = helper.make_node("Identity", [value.name], [name])
        self.nodes.append(last)
        return name

    def sweep(self) -> None:
        """Removes nodes and inputs that no output depends on: where nothing reads an input,
        OpenVINO binds the others wrongly."""
        live = set(self.outputs.values())
        live_nodes = []
        for node in reversed(self.nodes):
            if live.intersection(node.output):
                live.update(node.input)
                live_nodes.append(node)
        self.nodes = live_nodes[::-1]
        self.inputs = {name: kind for name, kind in self.inputs.items() if name in live}

    def model(self) -> bytes:
        """Returns the finished model, checked and serialised."""
        inputs = [_declaration(*item) for item in self.inputs.items()]
        constants = list(self.initializers.values())
        graph = helper.make_graph(
            self.nodes, "glm_core", inputs, self.declared, initializer=constants
        )
        opset = [helper.make_opsetid("", OPSET)]
        if any(node.domain == CONTRIB for node in self.nodes):
            opset.append(helper.make_opsetid(CONTRIB, 1))
        model = helper.make_model(graph, opset_imports=opset, ir_version=9)
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString(deterministic=True))


def facts(x: Tensor) -> tuple[list[int], str]:
    """Returns shape and dtype in a form that JSON can hold."""
    return list(x.shape), str(x.dtype).removeprefix("torch.")


def _declaration(name: str, kind: tuple[list[int], str]) -> onnx.ValueInfoProto:
    shape, dtype = kind
    return helper.make_tensor_value_info(name, ELEMENT[getattr(torch, dtype)], shape or SCALAR)
