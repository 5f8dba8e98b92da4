"""Exports quantized_linear as ONNX Runtime's own MatMulNBits instead of the translated reference.
Used on its CPU provider, the only one that is sure to have this contributed operator. Shapes: N
rows, D inputs, F features, G groups of a row."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from glm_core.backends.onnxrt.call import NBITS_BLOCK as BLOCK
from glm_core.backends.onnxrt.call import Call, unflatten
from glm_core.backends.onnxrt.graph import CONTRIB, Graph, Value, facts


def export(call: Call) -> bytes:
    """Returns plan and model as export.export does. Weights stay inputs; the graph swaps their
    nibbles and makes them unsigned, since the operator has the even element low and zero in the
    middle."""
    g = Graph()
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for dtype, shape in call.tensors]
    numbers = [int(n) for n in call.numbers or ()]
    x, weight, scale, bias, bits, rounding = unflatten(call.layout, tensors, numbers)
    width, features = x.shape[-1], len(weight)
    value = g.input("t0", x)
    value = _rounded(g, value, x) if rounding == 8 else value
    inputs = [value, _blocks(g, weight, bits, width), _scales(g, scale, width)]
    name = g.node(
        "MatMulNBits",
        *inputs,
        domain=CONTRIB,
        K=width,
        N=features,
        bits=bits,
        block_size=BLOCK,
        accuracy_level=1,  # float32; 4 rounds activations too, but not by the contract's rule
    )
    if bias is not None:
        name = g.node("Add", name, g.input("t3", bias))
    y = x.new_empty(*x.shape[:-1], features)
    out = g.output(Value(g.rounded(name, y.dtype), y))
    ports = [[n, int(n[1:].partition("_")[0]), *f] for n, f in g.inputs.items()]
    plan = {"inputs": ports, "results": [[out, 0, *facts(y)]], "numbers": []}
    return json.dumps(plan).encode() + b"\n" + g.model()


def _rounded(g: Graph, name: str, x: Tensor) -> str:
    """Rounds activations as ops.quant.round_activations does."""
    width, count = x.shape[-1], -(-x.shape[-1] // BLOCK)
    rows = x.numel() // width
    name = g.reshape(name, (rows, width))  # [N, D]
    if lacking := count * BLOCK - width:
        name = g.node("Pad", name, g.ints([0, 0, 0, lacking]))
    blocks = g.reshape(name, (rows, count, BLOCK))  # [N, blocks, BLOCK]
    top = g.node("ReduceMax", g.node("Abs", blocks), g.ints([-1]), keepdims=1)
    step = g.node("Div", top, g.constant(torch.tensor([127.0])))
    zero = g.constant(torch.tensor([0.0]))
    codes = g.node("Where", g.node("Greater", step, zero), g.node("Div", blocks, step), zero)
    limits = (g.constant(torch.tensor(v)) for v in (-127.0, 127.0))
    codes = g.node("Clip", g.node("Round", codes), *limits)
    whole = g.reshape(g.node("Mul", codes, step), (rows, count * BLOCK))  # [N, blocks * BLOCK]
    return g.reshape(g.slice(whole, 1, 0, width), x.shape)  # [..., D]


def _blocks(g: Graph, weight: Tensor, bits: int, width: int) -> str:
    """Returns codes [F, D] or [F, D / 2] as uint8 [F, blocks, bytes of a block]."""
    count, size = -(-width // BLOCK), BLOCK * bits // 8
    # the same bytes, bound as unsigned
    codes = g.input("t1", weight.new_empty(weight.shape, dtype=torch.uint8))
    if bits == 4:
        four = _byte(g, 4)
        high = g.node("BitShift", codes, four, direction="RIGHT")
        low = g.node("BitShift", codes, four, direction="LEFT")
        codes = g.node("BitwiseOr", high, low)
    codes = g.node("BitwiseXor", codes, _byte(g, 0x88 if bits == 4 else 0x80))
    if lacking := count * size - weight.shape[1]:
        codes = g.node("Pad", codes, g.ints([0, 0, 0, lacking]))
    return g.reshape(codes, (len(weight), count, size))  # [F, blocks, bytes]


def _byte(g: Graph, value: int) -> str:
    return g.constant(torch.tensor([value], dtype=torch.uint8))


def _scales(g: Graph, scale: Tensor, width: int) -> str:
    """Returns scales [F] or [F, G] in float32, repeated for each block: [F, blocks]."""
    groups, count = scale.numel() // len(scale), -(-width // BLOCK)
    each = g.reshape(g.input("t2", scale), (len(scale), groups, 1))  # [F, G, 1]
    each = g.expand(each, (len(scale), groups, count // groups))  # [F, G, blocks / G]
    return g.reshape(each, (len(scale), count))  # [F, blocks]
