"""Builds an ONNX graph, and writes each weight to a file beside it when it first occurs.

A size of 0 in a shape is known only when the graph runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

OPSET, CONTRIB = 21, "com.microsoft"
INLINE_BYTES = 1024
"""constants up to this size stay in the graph"""
PAGE = 4096
"""weights begin at multiples of this offset, so that the file can be memory-mapped"""
ELEMENT = {
    torch.float32: TensorProto.FLOAT,
    torch.int64: TensorProto.INT64,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}


class Graph:
    """Collects nodes, each distinct one once. Methods that add something return the name of its
    value."""

    def __init__(self, data: Path) -> None:
        self._data, self._file = data.name, data.open("wb")
        self._nodes: list[onnx.NodeProto] = []
        self._known: dict[Any, str] = {}
        self._initializers: list[onnx.TensorProto] = []
        self._ports: dict[str, list[onnx.ValueInfoProto]] = {"input": [], "output": []}
        self._names: dict[int, str] = {}
        self._kept: list[Tensor] = []

    def call_weights(self, named: dict[str, Tensor]) -> None:
        """Sets the names under which tensors are stored."""
        self._names = {id(tensor): name for name, tensor in named.items()}

    def node(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Adds a node with one output."""
        key = kind, inputs, repr(sorted(attributes.items()))
        if key not in self._known:
            [self._known[key]] = self.nodes(kind, 1, *inputs, domain=domain, **attributes)
        return self._known[key]

    def nodes(
        self, kind: str, count: int, *inputs: str, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Adds a node with several outputs."""
        names = [f"v{len(self._nodes)}_{i}" if i else f"v{len(self._nodes)}" for i in range(count)]
        self._nodes.append(
            helper.make_node(kind, list(inputs), names, domain=domain or None, **attributes)
        )
        return names

    def tensor(self, value: Tensor) -> str:
        """Adds a constant or a weight."""
        small = value.nbytes <= INLINE_BYTES
        array = value.detach().contiguous().numpy()
        key = (str(array.dtype), array.shape, array.tobytes()) if small else id(value)
        if key not in self._known:
            name = self._names.get(id(value)) or f"c{len(self._initializers)}"
            self._kept.append(value)  # as in `derived`
            self._known[key] = name
            make = numpy_helper.from_array if small else self._outside
            self._initializers.append(make(array, name))
        return self._known[key]

    def derived(self, of: Tensor, how: str, make: Callable[[], Tensor]) -> str:
        """Adds a weight in another form, `make()`, whose memory is released once it is written."""
        key = (how, id(of))
        if key not in self._known:
            name = f"{self._names.get(id(of), f'c{len(self._initializers)}')}.{how}"
            self._kept.append(of)  # an id is its own while the tensor lives
            self._known[key] = name
            self._initializers.append(self._outside(make().detach().contiguous().numpy(), name))
        return self._known[key]

    def ints(self, *values: int) -> str:
        """Adds a vector of int64."""
        return self.tensor(torch.tensor(values, dtype=torch.int64))

    def number(self, value: float) -> str:
        """Adds a float32 scalar."""
        return self.tensor(torch.tensor(value, dtype=torch.float32))

    def port(self, kind: str, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> None:
        """Declares an `input` or `output` of the graph. Sizes are numbers or names."""
        self._ports[kind].append(helper.make_tensor_value_info(name, ELEMENT[dtype], list(shape)))

    def name_output(self, value: str, name: str) -> None:
        """Gives a value the name of an output."""
        self._nodes.append(helper.make_node("Identity", [value], [name]))

    def close(self) -> None:
        """Closes the file of weights."""
        self._file.close()

    def model(self, metadata: dict[str, str]) -> onnx.ModelProto:
        """Returns the graph, without the file of weights that it refers to."""
        graph = helper.make_graph(
            self._nodes, "glm", self._ports["input"], self._ports["output"], self._initializers
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=10, producer_name="glm-core"
        )
        helper.set_model_props(model, metadata)
        return model

    def _outside(self, array: Any, name: str) -> onnx.TensorProto:
        self._file.write(bytes(-self._file.tell() % PAGE))
        offset = self._file.tell()
        self._file.write(array.data)
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        proto = TensorProto(name=name, data_type=kind, dims=array.shape)
        proto.data_location = TensorProto.EXTERNAL
        facts = {"location": self._data, "offset": offset, "length": array.nbytes}
        for key, value in facts.items():
            proto.external_data.add(key=key, value=str(value))
        return proto
