"""Checks what the rows of the decode bench count. Times themselves are never tested."""

from __future__ import annotations

import json

import pytest
import torch

from glm_core.backends.registry import probe
from glm_core.bench import chatglm, decode, llama, matmul_nbits, peers
from glm_core.config import ModelConfig
from glm_core.model.presets import preset

pytestmark = pytest.mark.skipif(not probe("cpu").ok, reason=probe("cpu").reason)


def tiny() -> ModelConfig:
    return preset(
        "glm-4-9b",
        num_layers=2,
        hidden=128,
        num_heads=4,
        num_kv_heads=2,
        ffn=256,
        vocab=128,
        max_length=1024,
    )


def test_rows_have_the_promised_fields_and_count_every_weight_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode, "shapes", tiny)
    monkeypatch.setattr(decode, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(
        decode, "engines", lambda c, p, f, dtypes: (decode.ours(c, dtype, p, f) for dtype in dtypes)
    )
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


def test_peers_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "shapes", tiny)
    monkeypatch.setattr(decode, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(decode.importlib.util, "find_spec", lambda name: None)
    result = decode.measure(2, 0, ["int4"])
    assert [r["engine"] for r in result["rows"]] == ["ours"]
    assert result["not_installed"] == list(decode.PEERS)


WEIGHTS = 2 * (128 * (128 + 2 * 2 * 32) + 128 * 128 + 3 * 128 * 256) + 128 * 128
"""of the products of `tiny`, head included"""


def needs(*packages: str) -> None:
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
def test_llama_cpp_runs_the_shapes(prefill: bool) -> None:
    needs("llama_cpp", "gguf")
    engine = llama.llama(tiny(), 16, prefill)
    engine.step()
    assert engine.num_bytes == WEIGHTS * 18 // 32


def test_llama_cpp_runs_latent_attention_and_experts() -> None:
    needs("llama_cpp", "gguf")
    sizes = {"hidden": 128, "num_heads": 4, "head_dim": 96, "kv_latent": 64, "q_latent": 64}
    sizes |= {"rope_head_dim": 32, "value_head_dim": 64, "ffn": 256, "vocab": 128}
    sizes |= {"num_experts": 8, "experts_per_token": 2, "expert_ffn": 96, "num_mtp_layers": 0}
    engine = llama.llama(preset("glm-4.7-flash", num_layers=2, **sizes), 16, False, context=64)
    engine.step()
    attention = 64 * 128 + 4 * 96 * 64 + 96 * 128 + 2 * 4 * 64 * 64 + 128 * 256
    read = 2 * attention + 3 * 256 * 128 + 3 * 3 * 96 * 128 + 128 * 128  # of 8 experts 2, and 1
    assert engine.num_bytes == read * 18 // 32


def test_chatglm_cpp_runs_the_shapes() -> None:
    needs("chatglm_cpp", "transformers")
    engine = chatglm.chatglm(tiny(), 16, False)
    engine.step()
    assert engine.num_bytes == WEIGHTS * 18 // 32


def test_genai_runs_the_shapes() -> None:
    needs("onnxruntime_genai", "transformers")
    engine = peers.genai(tiny(), 16, False)
    engine.step()
    assert engine.num_bytes == WEIGHTS // 2 + WEIGHTS // 128 * 4
