"""What Hygon's machines have that AMD's do not: a torch whose fused attention lies in a package of
its own, and a container in which another torch may have replaced theirs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from glm_core import ops
from glm_core.backends.base import Backend
from glm_core.backends.cuda import attention, probe
from glm_core.backends.cuda.supports import takes
from glm_core.backends.registry import use
from glm_core.backends.rocm import flash

DTK_ERROR = "No matching libraries found for flash_attn_2_cuda*.so"


@pytest.fixture(autouse=True)
def _nothing_was_tried() -> Iterator[None]:
    flash.trouble.cache_clear()
    yield
    flash.trouble.cache_clear()


def fused_attention_raises(patch: pytest.MonkeyPatch, text: str) -> None:
    """Lets torch's fused attention fail with this text."""

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(text)

    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", fails)


def call() -> dict[str, Any]:
    """Arguments of attention in which every query sees all keys."""
    q = torch.randn(1, 4, 2, 16)  # [B, L, H, E]
    ends = torch.full((1, 4), 4, dtype=torch.int32)
    return {
        "q": q,
        "k": q,
        "v": q,
        "key_start": torch.zeros_like(ends),
        "key_end": ends,
        "scale": 0.25,
    }


def rocm_on_cpu() -> Backend:
    """A backend with the rocm backend's attention, whose device is the CPU."""
    backend = Backend(name="rocm_on_cpu", device_type="cpu", verified="never")
    supports = attention.supports(backend, takes(backend, ops.attention), flash.trouble)
    backend.implements(ops.attention, supports)(attention.attention)
    return backend


def test_a_missing_library_is_a_reason_and_the_reference_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused_attention_raises(monkeypatch, DTK_ERROR)
    args = call()
    with use(rocm_on_cpu()) as session:
        y = ops.attention(**args)
    torch.testing.assert_close(y, ops.attention.reference(**args))
    assert "install the flash_attn wheel of this DTK" in str(session.fallbacks)


def test_another_failure_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fused_attention_raises(monkeypatch, "HIP error: an illegal memory access was encountered")
    assert flash.trouble(torch.device("cpu"), torch.float32) == ""
    with use(rocm_on_cpu()), pytest.raises(Exception, match="illegal memory access"):
        ops.attention(**call())


def test_a_torch_that_replaced_dtk_s_is_named(tmp_path: Path) -> None:
    assert probe.dtk(tmp_path) == ""
    (tmp_path / "opt/dtk-26.04").mkdir(parents=True)
    assert probe.dtk(tmp_path) == str(tmp_path / "opt/dtk-26.04")
    seen = probe.Facts("2.14.1+cu130", "13.0", None, "", 0, None, dtk="/opt/dtk")
    state = probe.rocm(seen)
    assert not state.ok
    assert state.reason.startswith("torch 2.14.1+cu130 is not the one of /opt/dtk: pip may have")
    assert probe.rocm(seen._replace(cuda=None, hip="6.3", devices=1)).ok
