"""The decode bench: what its rows count. Times themselves are never tested."""

from __future__ import annotations

import json

import pytest
import torch

from glm_core.backends.registry import probe
from glm_core.bench import decode, matmul_nbits
from glm_core.config import ModelConfig
from glm_core.model import preset

pytestmark = pytest.mark.skipif(not probe("cpu").ok, reason=probe("cpu").reason)


def tiny() -> ModelConfig:
    return preset(
        "glm-4-9b", num_layers=2, hidden=128, num_heads=4, num_kv_heads=2, ffn=256, vocab=128,
        max_length=1024,
    )  # fmt: skip


def test_rows_have_the_promised_fields_and_count_every_weight_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode, "shapes", tiny)
    monkeypatch.setattr(decode, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(decode, "engines", lambda c, p, f, dtypes: (
        decode.ours(c, dtype, p, f) for dtype in dtypes
    ))  # fmt: skip
    for prefill in (0, 40):
        result = decode.measure(2, prefill, ["float32", "int4"])
        assert json.dumps(result)
        assert {"engine", "dtype", "tokens_s", "gb_s", "bandwidth_share"} <= set(result["rows"][0])
        assert result["ceiling_gb_s"] > 0
    c = tiny()
    linears = 2 * (128 * (128 + 2 * 2 * 32) + 128 * 128 + 3 * 128 * 256)
    small = 2 * 2 * (2 * 128 + (128 + 2 * 2 * 32))  # norms and biases, bfloat16
    full = decode.ours(c, "float32", 4, False).num_bytes
    assert full == 4 * (linears + c.vocab * c.hidden) + 2 * small
    int4 = decode.ours(c, "int4", 4, False).num_bytes
    assert int4 == linears // 2 + 2 * linears // 128 + 2 * c.vocab * c.hidden + small


def test_the_chain_has_every_product() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    run, size = matmul_nbits.chain(tiny(), 3)
    [y] = run()
    assert y.shape == (3, 128)
    assert torch.from_numpy(y).isfinite().all()
    weights = 2 * (128 * 256 + 128 * 128 + 3 * 128 * 256) + 128 * 128
    assert weights / 2 < size < weights * 0.55
