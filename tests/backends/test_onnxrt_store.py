"""Tests the disk cache of exported models: it is reused, checked, and bounded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from glm_core import ops
from glm_core.backends import registry
from glm_core.backends.onnxrt import engine, store

pytest.importorskip("onnxruntime", reason="pip install 'glm-core[onnx]'")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLM_CORE_CACHE", str(tmp_path))
    engine._attempt.cache_clear()
    return tmp_path / "onnxrt"


def gelu(*shape: int) -> None:
    x = torch.randn(*shape)
    with registry.use("onnxrt", strict=True):
        torch.testing.assert_close(ops.gelu(x), ops.gelu.reference(x))


@pytest.mark.parametrize("keep", [0, 20, 400])
def test_truncated_file_is_made_again(cache: Path, keep: int) -> None:
    gelu(3, 4)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    engine._attempt.cache_clear()
    gelu(3, 4)
    assert file.read_bytes() == whole


def test_flipped_byte_is_noticed(cache: Path) -> None:
    gelu(3, 4)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert store.load(file.stem) is None


def test_cache_that_cannot_be_written_warns_and_runs(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot store exported models"):
        gelu(3, 4)


def test_least_recently_used_models_go_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (1, 2, 3):
        gelu(width)
    files = sorted(cache.iterdir(), key=lambda f: f.stat().st_mtime_ns)
    for age, file in enumerate(files):
        os.utime(file, (age, age))
    assert store.load(files[0].stem) is not None  # a use makes it the youngest
    monkeypatch.setattr(store, "MAX_FILES", 2)
    store.prune()
    assert set(cache.iterdir()) == {files[0], files[2]}
    monkeypatch.setattr(store, "MAX_BYTES", 1)
    store.prune()
    assert not list(cache.iterdir())


def test_second_process_needs_neither_tracer_nor_onnx(cache: Path) -> None:
    gelu(3, 4)
    code = (
        "import sys, torch; from glm_core import ops; from glm_core.backends import registry\n"
        "with registry.use('onnxrt', strict=True): ops.gelu(torch.randn(3, 4))\n"
        "assert 'onnxruntime' in sys.modules and 'onnx' not in sys.modules, 'exported again'"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)


def scale(x: Any) -> Any:
    return x * FACTOR


FACTOR = 2.0


def reference(x: Any) -> Any:
    return scale(x) + 1


def test_fingerprint_sees_what_the_reference_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    before = store.fingerprint(reference)
    assert store.fingerprint(reference) == before
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3.0)
    other_constant = store.fingerprint(reference)
    monkeypatch.setattr(sys.modules[__name__], "scale", lambda x: x - FACTOR)
    assert len({before, other_constant, store.fingerprint(reference)}) == 3
