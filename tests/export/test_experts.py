"""Tests that products with experts in codes, exported, give what our op gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glm_core import dispatch, ops
from glm_core.ops.quant import quantize

pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

from glm_core.export.graph import Graph  # noqa: E402  # imports onnx
from glm_core.export.translate import translate  # noqa: E402
from glm_core.export.value import Value  # noqa: E402


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 0)])
def test_each_expert_s_rows_meet_its_own_codes(bits: int, group: int, tmp_path: Path) -> None:
    """One expert has no rows, and one call has no rows at all."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 16, 64, generator=g)
    codes, scale = quantize(weight.flatten(0, 1), bits, group)
    codes, scale = codes.unflatten(0, (3, 16)), scale.unflatten(0, (3, 16))
    graph = Graph(tmp_path / "model.onnx.data")
    graph.port("input", "rows", torch.float32, ("m", 64))
    graph.port("input", "counts", torch.int64, (3,))
    rows, counts = Value(graph, "rows", (0, 64)), Value(graph, "counts", (3,), torch.int64)
    with dispatch.intercept(translate):
        y = ops.quantized_grouped_linear(rows, codes, scale, counts, bits)  # type: ignore[arg-type]  # values of the graph
    graph.name_output(y.name, "y")  # type: ignore[attr-defined]
    graph.port("output", "y", torch.float32, ("m", 16))
    graph.close()
    (tmp_path / "model.onnx").write_bytes(graph.model({}).SerializeToString())
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for sizes in ([3, 0, 2], [0, 0, 0]):
        x = torch.randn(sum(sizes), 64, generator=g)
        feed = {"rows": x.numpy(), "counts": torch.tensor(sizes).numpy()}
        (found,) = session.run(["y"], feed)
        want = ops.quantized_grouped_linear.reference(x, codes, scale, torch.tensor(sizes), bits)
        torch.testing.assert_close(torch.from_numpy(found), want, rtol=1e-5, atol=1e-5)
