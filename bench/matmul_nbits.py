"""Runs the products of a model as a chain of ONNX Runtime's MatMulNBits: int4, blocks of 128, int8
activations (accuracy_level 4). Without norms and attention it is less work than a model's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from glm_core.config import ModelConfig

BLOCK = 128


def chain(config: ModelConfig, rows: int) -> tuple[Callable[[], Any], int]:
    """Returns (a call that passes through all layers and the head, bytes of their weights)."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    c, nodes, tensors = config, list[Any](), list[Any]()
    inner, kv = c.num_heads * c.head_dim, 2 * c.num_kv_heads * c.head_dim

    def product(x: str, columns: int, out: int) -> str:
        name, generator = f"v{len(nodes)}", np.random.default_rng(len(nodes))
        codes = generator.integers(0, 256, (out, columns // BLOCK, BLOCK // 2), dtype=np.uint8)
        scale = np.full((out, columns // BLOCK), 0.01 * columns**-0.5, np.float32)
        for part, array in (("w", codes), ("s", scale)):
            tensors.append(numpy_helper.from_array(array, name + part))
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                [x, name + "w", name + "s"],
                [name],
                domain="com.microsoft",
                K=columns,
                N=out,
                bits=4,
                block_size=BLOCK,
                accuracy_level=4,
            )
        )
        return name

    def first(x: str, size: int, whole: int) -> str:
        name = f"v{len(nodes)}"
        sizes = numpy_helper.from_array(np.array([size, whole - size]), name + "n")
        tensors.append(sizes)
        nodes.append(helper.make_node("Split", [x, name + "n"], [name, name + "_"], axis=1))
        return name

    x = "x"
    for _ in range(c.num_layers):
        x = product(first(product(x, c.hidden, inner + kv), inner, inner + kv), inner, c.hidden)
        x = product(first(product(x, c.hidden, 2 * c.ffn), c.ffn, 2 * c.ffn), c.ffn, c.hidden)
    y = product(x, c.hidden, c.vocab)
    size = sum(len(t.raw_data) for t in tensors)
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, c.hidden])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, [rows, c.vocab])],
        tensors,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    value = {"x": np.ones((rows, c.hidden), np.float32)}
    return lambda: session.run(None, value), size
