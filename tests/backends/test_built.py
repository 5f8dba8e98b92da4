"""An extension that was built for another torch is not loaded, and says which one in a line."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from glm_core.backends.cpu import built, extension
from glm_core.backends.cuda import extension as gpu_extension

HERE = {"torch": torch.__version__, "cxx11_abi": torch.compiled_with_cxx11_abi()}
BUILD = "pip install --no-build-isolation -e ."


def leave(folder: Path, note: dict[str, object], extension: str = "no library") -> Path:
    """Writes an extension that would end the import, and its note."""
    folder.mkdir(exist_ok=True)
    library = folder / f"_C{built.EXTENSION_SUFFIXES[0]}"
    library.write_text(extension)
    library.with_suffix(".json").write_text(json.dumps(note))
    return folder


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"loaded {name}"))


def test_of_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(tmp_path, HERE | {"torch": "2.6.1"})
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "extension.py"))
    assert extension._load() == (
        f"its C++ extension is built for torch 2.6.1, running {torch.__version__}; "
        f"rebuild with: {BUILD}"
    )


def test_kernels_of_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(tmp_path / "rocm", HERE | {"torch": "2.6.1"})
    monkeypatch.setattr(gpu_extension, "__file__", str(tmp_path / "cuda/extension.py"))
    monkeypatch.setattr(gpu_extension.cpu, "probe", lambda: extension.Probe(True))
    reason = gpu_extension.load("glm_core.backends.rocm._C", "rocm")
    assert "its kernels are built for torch 2.6.1, running" in reason
    assert reason.endswith(f"rebuild with: GLM_CORE_BUILD=rocm {BUILD}")


def test_of_another_abi(tmp_path: Path) -> None:
    note = HERE | {"cxx11_abi": not HERE["cxx11_abi"]}
    reason = built.trouble(leave(tmp_path, note), BUILD)
    assert "with the old C++ ABI" in reason
    assert "rebuild with" in reason


def test_a_vendor_s_build_of_the_same_version_fits(tmp_path: Path) -> None:
    note = HERE | {"torch": f"{torch.__version__.partition('+')[0]}+das.opt1.dtk2604"}
    assert built.trouble(leave(tmp_path, note), BUILD) == ""


def test_not_built_has_the_build_s_reason(tmp_path: Path) -> None:
    assert built.trouble(tmp_path, BUILD) == f"not built; {BUILD}"
    (library,) = leave(tmp_path, {"trouble": "no C++ compiler"}).glob("_C*[!n]")
    library.unlink()
    assert built.trouble(tmp_path, BUILD) == f"not built: no C++ compiler; {BUILD}"


def test_without_a_note_it_is_not_loaded(tmp_path: Path) -> None:
    (note,) = leave(tmp_path, HERE).glob("_C*.json")
    note.unlink()
    assert (
        built.trouble(tmp_path, BUILD) == f"without a note of the torch it was built for; {BUILD}"
    )
