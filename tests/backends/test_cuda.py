"""Tests the cuda and rocm backends without a GPU: attention's values, which arguments are refused
and why, what is reported for a missing driver or device, and whole training steps on fake
tensors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fibers_judge import LEAVES
from torch import Tensor

from glm_core import ops
from glm_core.backends import cuda, rocm
from glm_core.backends.base import Backend
from glm_core.backends.cuda import attention, extension, peaks, probe
from glm_core.backends.cuda.kernels import SHARED, share
from glm_core.backends.cuda.supports import takes
from glm_core.backends.registry import get, use
from glm_core.backends.registry import probe as probe_backend
from glm_core.conformance.case import Case, select
from glm_core.conformance.check import judge

ROOT = Path(__file__).parents[2]
EAGER_FLEX_OVERFLOWS = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11)
FUSED = Backend(name="fused", device_type="cpu", verified="executed on the CPU")
FUSED.implements(ops.attention)(attention.attention)


def fused_cases() -> list[Case]:
    """Returns the cases that torch's fused kernels take; FlexAttention has no backward on the
    CPU."""
    found = []
    for case in select(FUSED, op="attention", real=False):
        args = case.sample.make(case.dtype)
        kind = attention.mask_kind(args["key_start"], args["key_end"], args["k"].shape[1])
        takes = args["q"].numel() and not attention.head_size(args["q"].shape[-1])
        if takes and (case.mode == "test" or kind != "interval"):
            found.append(case)
    return found


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("case", fused_cases(), ids=lambda c: c.id)
def test_attention_conforms(case: Case) -> None:
    if EAGER_FLEX_OVERFLOWS and case.id == "attention-float16-1x9x2x16-huge-test":
        pytest.skip("FlexAttention's scores overflow in float16 on the CPU before torch 2.11")
    judged = judge(case, FUSED)
    assert not judged.reason or (judged.error_ratio or 0) <= 2, judged.reason


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_a_query_that_sees_nothing_gives_zeros() -> None:
    q = torch.randn(1, 4, 2, 16, generator=torch.Generator().manual_seed(0))
    start, end = torch.tensor([[0, 2, 0, 1]]).int(), torch.tensor([[1, 2, 3, 1]]).int()
    y = attention.attention(q, q, q, start, end, 0.25)
    assert torch.equal(y[:, 1::2], torch.zeros(1, 2, 2, 16))
    torch.testing.assert_close(y, ops.attention.reference(q, q, q, start, end, 0.25))


@pytest.mark.parametrize("length", [1, 128, 129, 300])
def test_block_mask_lists_every_visible_key_and_no_half_visible_block_as_whole(length: int) -> None:
    g = torch.Generator().manual_seed(length)
    start, end = (torch.randint(0, length + 1, (3, length), generator=g).int() for _ in range(2))
    start, end = start.minimum(end), end.maximum(start)
    start[0], end[0] = 0, length  # whole blocks
    mask = attention.block_mask(start, end, length)
    j = torch.arange(length)
    visible = (j >= start[..., None]) & (j < end[..., None])  # [B, L, S]
    rows = -(-length // attention.BLOCK)
    pad = rows * attention.BLOCK - length
    blocks = torch.nn.functional.pad(visible, (0, pad, 0, pad)).unfold(1, 128, 128)
    blocks = blocks.unfold(2, 128, 128).flatten(-2)  # [B, M, N, 128 * 128]
    some, whole = blocks.any(-1), blocks.all(-1)
    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(partial | full, some)
    assert torch.equal(full, whole)


def listed(numbers: Any, indices: Any) -> Tensor:
    """Returns which blocks the lists name, [B, M, N]."""
    named = torch.zeros(indices[:, 0].shape, dtype=torch.bool)
    counted = torch.arange(named.shape[-1]) < numbers[:, 0, :, None]
    return named.scatter(-1, indices[:, 0].long(), counted)


def test_the_kind_of_mask_is_asked_again_when_the_mask_changes() -> None:
    start, end = torch.zeros(1, 4).int(), torch.full((1, 4), 4).int()
    assert attention.mask_kind(start, end, 4) == "full"
    end.copy_(torch.arange(1, 5))
    assert attention.mask_kind(start, end, 4) == "causal"
    start[0, 3] = 1
    assert attention.mask_kind(start, end, 4) == "interval"


@pytest.mark.skipif(not attention.HAS_TRITON, reason="pip install triton")
def test_attention_and_its_predicate_compile_whole() -> None:
    backend = Backend(name="compiled", device_type="cpu", verified="executed on the CPU")
    supports = attention.supports(backend, takes(backend, ops.attention))
    backend.implements(ops.attention, supports)(attention.attention)
    q = torch.randn(1, 9, 2, 16, generator=torch.Generator().manual_seed(0))
    end = torch.arange(1, 10).int()[None]
    with use(backend, strict=True), torch.no_grad():
        compiled = torch.compile(ops.attention, fullgraph=True, backend="eager")
        y = compiled(q, q, q, torch.zeros_like(end), end, 0.25)
    torch.testing.assert_close(y, ops.attention.reference(q, q, q, 0 * end, end, 0.25))


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
    assert "multiples of 8 from 16 to 256" in attention.head_size(33)
    assert "multiples of 8" in attention.head_size(512)


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
        assert set(backend.kernels) == {*SHARED, "linear", "attention"} & {*get("cpu").kernels}
    for leaf in LEAVES:
        assert f'm.impl("{leaf}", {leaf})' in bindings


@pytest.fixture(scope="module")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the library that lets torch hold fake tensors on `cuda`."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no compiler {compiler}")
    folder = Path(torch.__file__).parent
    target = tmp_path_factory.mktemp("fake_cuda") / "libfake_cuda.so"
    subprocess.run(
        [
            compiler,
            "-std=c++20",
            "-O0",
            "-shared",
            "-fPIC",
            f"-I{folder}/include",
            str(ROOT / "csrc" / "tests" / "fake_cuda.cpp"),
            f"-L{folder}/lib",
            "-ltorch_cpu",
            "-lc10",
            f"-Wl,-rpath,{folder}/lib",
            "-o",
            str(target),
        ],
        check=True,
        capture_output=True,
    )
    return target


def dry_run(library: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(Path(__file__).parent / "cuda_dry_run.py"), *words],
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(not probe_backend("cpu").ok, reason=probe_backend("cpu").reason)
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a CUDA of its own")
@pytest.mark.parametrize(("backend", "dtype"), [("cuda", "bfloat16"), ("rocm", "float16")])
def test_training_steps_on_fake_cuda(fake_cuda: Path, backend: str, dtype: str) -> None:
    done = dry_run(fake_cuda, backend, dtype)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, found in json.loads(done.stdout).items():
        assert not found["wrong"], name
        assert {"attention", "linear", "linear_cross_entropy", "global_norm", "adamw"} <= set(
            found["ops"]
        )


@pytest.mark.skipif(not probe_backend("cpu").ok, reason=probe_backend("cpu").reason)
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a CUDA of its own")
def test_a_tensor_left_on_the_host_is_an_error(fake_cuda: Path) -> None:
    done = dry_run(fake_cuda, "cuda", "bfloat16", "token_weight")
    assert done.returncode == 1
    assert "kernels take tensors on one cuda device, received cuda:0 and cpu" in done.stderr
