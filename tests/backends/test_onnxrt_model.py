"""Tests the model on the onnxrt backend: eager, compiled, on fake tensors, and trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from glm_core.backends import registry
from glm_core.config import ModelConfig, TrainConfig
from glm_core.model.glm import GLM
from glm_core.training.optimizer import Optimizer

pytest.importorskip("onnxruntime", reason="pip install 'glm-core[onnx]'")

CONFIG = ModelConfig(num_layers=1, hidden=32, num_heads=2, ffn=48, vocab=64, max_length=32)
INPUTS = ("tokens", "positions", "key_start", "key_end", "labels", "token_weight")


def batch(b: int = 2, length: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, CONFIG.vocab, (2, b, length), generator=generator)
    line = torch.arange(length)
    positions = line.expand(b, 2, length)
    end = (line + 1).int().expand(b, length)
    weight = torch.full((b, length), 1 / (b * length))
    return [tokens, positions, torch.zeros_like(end), end, labels, weight]


def step(model: GLM, loss: object, inputs: list[Tensor]) -> tuple[float, list[Tensor]]:
    model.zero_grad()
    value = loss(*inputs)  # type: ignore[operator]  # a loss by name
    value.backward()
    return float(value.detach()), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_follows_the_reference(dtype: str) -> None:
    losses: dict[str, list[float]] = {"reference": [], "onnxrt": []}
    for backend, curve in losses.items():
        model = GLM(CONFIG).init_weights(0).to(getattr(torch, dtype))
        optimizer = Optimizer(model, TrainConfig(dtype=dtype))  # type: ignore[arg-type]  # TrainConfig checks it
        for _ in range(4):
            with registry.use(backend, strict=True):
                curve.append(step(model, model.loss, batch())[0])
                optimizer.step(1e-2)
    assert losses["onnxrt"][-1] < losses["onnxrt"][0] - 0.1
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]  # loss is about 4; far below one step
    torch.testing.assert_close(
        torch.tensor(losses["onnxrt"]), torch.tensor(losses["reference"]), rtol=0, atol=tolerance
    )


def test_compiled_in_one_graph_equals_eager() -> None:
    model = GLM(CONFIG).init_weights(0)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    with registry.use("onnxrt", strict=True) as session:
        eager_loss, eager_grads = step(model, model.loss, batch())
        loss, grads = step(model, compiled, batch())
    assert loss == eager_loss
    assert all(torch.equal(a, b) for a, b in zip(grads, eager_grads, strict=True))
    assert not session.fallbacks
    assert not session.compiled


def test_fake_tensors_pass_through_without_a_session() -> None:
    real = batch()
    with FakeTensorMode() as mode, registry.use("onnxrt", strict=True):
        model = GLM(CONFIG)
        loss = model.loss(*(mode.from_tensor(x) for x in real))
        loss.backward()
    assert loss.shape == ()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
