"""Tests where the GPU kernels' bindings find torch's stream on a torch whose C++ does not tell it:
a stand-in answers in place of torch's CUDA part."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import fibers_build
import pytest
import torch

SOURCE = """
#include "bindings/cuda/stream.h"
extern "C" void* stream(int device) { return glm::gpu::stream_by_python(device); }
"""


@pytest.mark.skipif(
    shutil.which(fibers_build.COMPILER) is None, reason=f"no compiler {fibers_build.COMPILER}"
)
def test_torchs_python_tells_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, library = tmp_path / "stream.cpp", tmp_path / "stream.so"
    source.write_text(SOURCE)
    linked = [f"-L{fibers_build.TORCH}/lib", "-lc10", f"-Wl,-rpath,{fibers_build.TORCH}/lib"]
    command = [fibers_build.COMPILER, *fibers_build.BINDING, "-shared", str(source), *linked]
    fibers_build.run([*command, "-o", str(library)])
    stream = ctypes.PyDLL(str(library)).stream
    stream.restype = ctypes.c_void_p
    streams = {0: 0x7000, 1: 0x7FFF_0000_1000}
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", streams.__getitem__, raising=False)
    assert [stream(device) for device in streams] == list(streams.values())
