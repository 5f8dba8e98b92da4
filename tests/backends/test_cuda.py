"""Tests the cuda and rocm backends without a GPU: which arguments are refused
and why, what is reported for a missing driver or device, and whole training steps on fake
tensors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fibers_judge import LEAVES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from glm_core import ops
from glm_core.backends import cuda, rocm
from glm_core.backends.base import Backend
from glm_core.backends.cuda import attention, extension, peaks, probe
from glm_core.backends.cuda.experts import MODULES
from glm_core.backends.cuda.kernels import SHARED, share
from glm_core.backends.cuda.supports import takes
from glm_core.backends.registry import get, use
from glm_core.backends.registry import probe as probe_backend

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gives the operator of attention a kernel on the CPU, the reference: what is tested is all
    that lies around the kernels, whose values tests/backends/test_triton.py judges."""
    library = torch.library.Library("glm_core_gpu", "IMPL")

    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        q = args[0]
        stats = [q.new_zeros(q.shape[0], q.shape[2], q.shape[1]) for _ in range(2)]
        return ops.attention.reference(*args), stats[0], stats[1]

    library.impl("attention", forward, "CPU")
    monkeypatch.setattr(attention, "HAS_TRITON", True)
    yield
    library._destroy()


@pytest.mark.usefixtures("stand_in")
def test_attention_and_its_predicate_compile_whole() -> None:
    backend = Backend(name="compiled", device_type="cpu", verified="executed on the CPU")
    supports = attention.supports(takes(backend, ops.attention))
    backend.implements(ops.attention, supports)(attention.attention)
    q = torch.randn(1, 9, 2, 16, generator=torch.Generator().manual_seed(0))
    end = torch.arange(1, 10).int()[None]
    with use(backend, strict=True), torch.no_grad():
        compiled = torch.compile(ops.attention, fullgraph=True, backend="eager")
        for scale in (0.25, 0.4, -0.25):
            y = compiled(q, q, q, torch.zeros_like(end), end, scale)
            expected = ops.attention.reference(q, q, q, 0 * end, end, scale)
            torch.testing.assert_close(y, expected)


@pytest.mark.usefixtures("stand_in")
def test_fakes_of_attention_s_operators_are_what_they_return() -> None:
    q = torch.randn(2, 5, 4, 16)
    k = torch.randn(2, 2, 9, 16).transpose(1, 2)  # a cache's layout
    v = torch.randn(2, 2, 9, 12).transpose(1, 2)
    end = torch.full((2, 5), 9).int()
    args = (q, k, v, torch.zeros_like(end), end, 0.25)
    real = torch.ops.glm_core_gpu.attention(*args)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args]
        made = torch.ops.glm_core_gpu.attention(*fakes)
        grads = torch.ops.glm_core_gpu.attention_backward(made[0], *fakes[:5], *made, 0.25)
    for fake, tensor in zip(
        (*made, *grads), (*real, q, k.contiguous(), v.contiguous()), strict=True
    ):
        assert (fake.shape, fake.dtype) == (tensor.shape, tensor.dtype)
        assert fake.is_contiguous()


def test_attention_s_reasons_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def trouble(e: int, c: int, dtype: torch.dtype = torch.float16) -> str:
        q = meta(1, 4, 2, e, dtype=dtype)
        return attention.trouble(q, q, meta(1, 4, 2, c, dtype=dtype))

    monkeypatch.setattr(attention, "HAS_TRITON", True)
    assert not trouble(1, 1)
    assert not trouble(33, 20, torch.float32)
    with torch.no_grad():
        assert not trouble(576, 512)
    assert trouble(257, 257).startswith("head sizes 257 and 257: the kernels take 1 to 256, and")
    assert "need half precision on NVIDIA's chips" in trouble(576, 512, torch.float32)
    q = meta(1, 4, 2, 576, dtype=torch.float16).requires_grad_()
    assert "have no gradient; expand the latents" in attention.trouble(q, q, q[..., :512])
    monkeypatch.setattr(attention, "HAS_TRITON", False)
    assert "pip install triton" in trouble(16, 16)


@pytest.mark.skipif(not attention.HAS_TRITON, reason="pip install triton")
def test_a_chip_that_this_triton_does_not_know_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", "3.6.0")
    attention.chip_trouble.cache_clear()
    assert not attention.chip_trouble("gfx90a")
    reason = attention.chip_trouble("gfx906")
    assert reason == "Triton 3.6.0 does not compile for gfx906; install triton 3.8 or newer"
    attention.chip_trouble.cache_clear()


def meta(*shape: int, dtype: torch.dtype = torch.float32, device: str = "meta") -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


class Elsewhere(Backend):
    """Returns a backend with the kernels for meta tensors, which torch has everywhere."""


def refused(op: str, **args: Any) -> str:
    backend = Elsewhere(name="elsewhere", device_type="meta", verified="shapes only")
    share(backend)
    answer = backend.support(ops.all_ops()[op], args)
    assert answer.ok == (not answer.reason)
    return answer.reason


def test_refusals_say_which_fact_is_the_obstacle() -> None:
    x, w = meta(4, 8), meta(8)
    assert not refused("rms_norm", x=x, weight=w)
    for want, args in {
        "one meta device, received meta and cpu": {"x": x, "weight": torch.ones(8)},
        "one dtype, received torch.float32 and torch.float16": {"x": x, "weight": w.half()},
        "float32, bfloat16, float16, received torch.float64": {"x": x.double(), "weight": w},
    }.items():
        assert want in refused("rms_norm", **args)
    ids = refused("embedding", ids=meta(3, dtype=torch.int32), weight=x)
    assert ids == "kernels take ids in torch.int64, received torch.int32"


@pytest.mark.parametrize("name", ["cuda", "rocm"])
def test_kernels_that_are_not_built_are_a_reason(name: str) -> None:
    answer = get(name).support(ops.rms_norm, {"x": meta(4, 8), "weight": meta(8)})
    assert not answer.ok
    if "not built" in answer.reason:
        assert f"GLM_CORE_BUILD={name} pip install" in answer.reason


def test_a_toolkit_of_another_major_version_is_named() -> None:
    assert not extension._mismatch("13.0", "13.2", "x")
    reason = extension._mismatch("12.8", "13.0", "BUILD")
    assert "built with toolkit 12.8" in reason
    assert "use toolkit 13.x, rebuild with: BUILD" in reason


SEEN = probe.Facts("2.13.0", "13.0", None, "", 1, None, "sm_90", ("sm_80", "sm_90", "compute_90"))
ANSWERS = {
    "usable": (SEEN, ""),
    "no CUDA": (SEEN._replace(cuda=None), "built without CUDA; install a CUDA build"),
    "a ROCm torch": (SEEN._replace(cuda=None, hip="6.4"), "use backend rocm"),
    "no driver": (SEEN._replace(trouble="Found no NVIDIA driver", devices=0), "install a driver"),
    "no device": (SEEN._replace(devices=0), "check that this machine or container has one"),
    "hidden": (SEEN._replace(devices=0, visible="-1"), "CUDA_VISIBLE_DEVICES='-1' hides them"),
    "minor": (SEEN._replace(capability="sm_86"), ""),
    "newer": (SEEN._replace(capability="sm_120"), ""),
    "too old": (SEEN._replace(capability="sm_70"), "this device is sm_70"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_probe_gives_the_reason_and_the_way_out(name: str) -> None:
    seen, words = ANSWERS[name]
    state = probe.cuda(seen)
    assert state.ok == (not words)
    assert words in state.reason


def test_probe_of_amd_and_hygon() -> None:
    seen = SEEN._replace(cuda=None, hip="6.4", capability="gfx90a", built=("gfx90a", "gfx942"))
    assert probe.rocm(seen).ok
    assert "this device is gfx928" in probe.rocm(seen._replace(capability="gfx928")).reason
    assert "use backend cuda" in probe.rocm(SEEN).reason
    assert "DTK" in probe.rocm(SEEN._replace(cuda=None)).reason


def test_no_bfloat16_where_the_chip_has_none() -> None:
    assert torch.bfloat16 not in rocm.dtypes("gfx906")
    assert torch.bfloat16 in rocm.dtypes("gfx90a")


def test_peaks_are_the_named_chips() -> None:
    for name, dtype, tflops in (
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756.4),
        ("NVIDIA A100-SXM4-40GB", torch.float32, 19.5),
        ("Tesla V100-SXM2-32GB", torch.float16, 125),
    ):
        found = peaks.peak(name, dtype)
        assert found is not None
        assert found.tflops == tflops
        assert found.source
    assert peaks.peak("Tesla V100-SXM2-32GB", torch.bfloat16) is None
    assert peaks.peak("some other device", torch.float32) is None


def test_every_op_has_a_kernel_and_every_operator_a_device_half() -> None:
    bindings = "".join(p.read_text() for p in (ROOT / "csrc" / "bindings" / "cuda").glob("*.cpp"))
    for backend in (cuda.backend, rocm.backend):
        every = {*SHARED, *MODULES, "linear", "attention"}
        assert set(backend.kernels) == every & {*get("cpu").kernels}
    for leaf in LEAVES:
        assert f'm.impl("{leaf}", {leaf})' in bindings


def fake_cuda(folder: Path) -> Path:
    """Builds the library that lets torch hold fake tensors on `cuda`."""
    compiler, torch_folder = os.environ.get("CXX", "c++"), Path(torch.__file__).parent
    if shutil.which(compiler) is None:
        pytest.skip(f"no compiler {compiler}")
    target = folder / "libfake_cuda.so"
    subprocess.run(
        [
            compiler,
            "-std=c++20",
            "-O0",
            "-shared",
            "-fPIC",
            f"-I{torch_folder}/include",
            str(ROOT / "csrc" / "tests" / "fake_cuda.cpp"),
            f"-L{torch_folder}/lib",
            "-ltorch_cpu",
            "-lc10",
            f"-Wl,-rpath,{torch_folder}/lib",
            "-o",
            str(target),
        ],
        check=True,
        capture_output=True,
    )
    return target


@pytest.mark.skipif(not probe_backend("cpu").ok, reason=probe_backend("cpu").reason)
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a CUDA of its own")
def test_training_steps_on_fake_cuda(tmp_path: Path) -> None:
    """Whole steps of both backends, and one whose weights of the tokens stay on the host, which is
    an error: one process, which imports torch once."""
    env = {**os.environ, "LD_PRELOAD": str(fake_cuda(tmp_path)), "OMP_NUM_THREADS": "1"}
    script, stray = Path(__file__).with_name("cuda_dry_run.py"), "cuda:bfloat16:token_weight"
    done = subprocess.run(
        [sys.executable, str(script), "cuda:bfloat16", "rocm:float16", stray],
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout)
    reason = "kernels take tensors on one cuda device, received cuda:0 and cpu"
    assert reason in str(answers.pop(stray))
    for run, answer in answers.items():
        for name, found in answer.items():
            assert not found["wrong"], (run, name)
            assert {"attention", "linear", "linear_cross_entropy", "global_norm", "adamw"} <= set(
                found["ops"]
            )
            experts = {"route", "permute", "grouped_linear", "unpermute"}
            assert experts.isdisjoint(found["ops"]) != (name == "glm-4.7-flash")
