"""Tests what the ascend backend says where it cannot run: each obstacle, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glm_core.backends.ascend import availability


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Sets torch_npu's version, the device files and what importing torch_npu does; returns the
    probe's reason."""

    def probe(version: str | None, devices: bool, load: Callable[[str], Any] | None = None) -> str:
        def installed(name: str) -> str:
            if version is None:
                raise availability.metadata.PackageNotFoundError(name)
            return version

        (tmp_path / "davinci_manager").touch()
        if devices:
            (tmp_path / "davinci0").touch()
        monkeypatch.setattr(availability.metadata, "version", installed)
        monkeypatch.setattr(availability, "DEVICES", tmp_path)
        if load is not None:
            monkeypatch.setattr(availability.importlib, "import_module", load)
        return availability.probe().reason

    return probe


def _fails(error: Exception) -> Callable[[str], Any]:
    def load(name: str) -> Any:
        raise error

    return load


def test_probe_names_every_obstacle_and_the_way_out(machine: Callable[..., str]) -> None:
    torch_version = torch.__version__.partition("+")[0]
    both = machine(None, False)
    assert f"torch_npu is not installed (pip install torch-npu=={torch_version})" in both
    assert "no /dev/davinci*" in both
    assert "--device /dev/davinci0" in both
    mismatch = machine("2.1.0.post8", True)
    assert "torch_npu 2.1.0.post8 does not fit torch" in mismatch
    assert "no /dev/davinci*" not in mismatch
    missing = machine(torch_version, True, _fails(ImportError("libhccl.so: cannot open\nfile")))
    assert missing.startswith("torch_npu does not load: libhccl.so: cannot open (source ")
    unset = machine(
        torch_version, True, _fails(Exception("ASCEND_HOME_PATH : none does not exist"))
    )
    assert "ASCEND_HOME_PATH : none does not exist (source " in unset


def test_probe_asks_torch_npu_last(
    machine: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = torch.__version__.partition("+")[0]
    for available, start in ((False, "torch_npu sees no device"), (True, "")):
        device_module = SimpleNamespace(is_available=lambda available=available: available)
        monkeypatch.setattr(
            availability.torch, "get_device_module", lambda _, module=device_module: module
        )
        reason = machine(version, True, lambda name: None)
        assert reason.startswith(start)
        assert bool(reason) == (not available)
