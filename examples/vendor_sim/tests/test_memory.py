"""Tests that the device has its own memory: no pointer works on the wrong side, and it can run
out."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import warnings
from collections.abc import Callable

import pytest
import torch
import vendor_sim


def test_device_pointer_faults_on_the_host() -> None:
    address = torch.zeros(4, device="sim").data_ptr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: forking with threads
        child = os.fork()
    if child == 0:
        faulthandler.disable()
        ctypes.string_at(address, 16)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV


def test_device_refuses_host_pointer() -> None:
    with pytest.raises(RuntimeError, match="not allocated device memory"):
        torch.ops.sim.peek(torch.zeros(4).data_ptr(), 16)


def test_device_refuses_freed_memory_and_overruns() -> None:
    tensor = torch.zeros(16, device="sim")
    address = tensor.data_ptr()
    assert torch.ops.sim.peek(address, 64).numel() == 64
    with pytest.raises(RuntimeError, match="not allocated device memory"):
        torch.ops.sim.peek(address, 65)
    del tensor
    with pytest.raises(RuntimeError, match="not allocated device memory"):
        torch.ops.sim.peek(address, 64)


@pytest.mark.parametrize(
    "mix",
    [
        lambda d, h: d + h,
        lambda d, h: d @ h,
        lambda d, h: torch.cat([d, h]),
        lambda d, h: torch.where(d > 0, d, h),
        lambda d, h: torch.ops.sim.geglu_backward(d[:, :2].contiguous(), h),
    ],
    ids=["add", "matmul", "cat", "where", "native"],
)
def test_tensors_of_two_memories_do_not_mix(
    mix: Callable[[torch.Tensor, torch.Tensor], object],
) -> None:
    host = torch.ones(4, 4)
    with pytest.raises(RuntimeError, match=r"same device|another on sim|not allocated device"):
        mix(host.to("sim"), host)


def test_fresh_memory_is_not_zero() -> None:
    assert torch.empty(1000, device="sim").isnan().all()


def test_round_trip_keeps_every_bit() -> None:
    host = torch.randn(7, 5, dtype=torch.float64)
    assert torch.equal(host.to("sim").cpu(), host)
    assert torch.equal(host.to("sim").t().cpu(), host.t())
    assert torch.equal(host.to("sim")[:, 1:3].cpu(), host[:, 1:3])


def test_statistics_follow_use() -> None:
    before = torch.sim.memory_allocated()
    torch.sim.reset_peak_memory_stats()
    tensor = torch.empty(1024, device="sim")
    assert torch.sim.memory_allocated() == before + 4096
    del tensor
    assert torch.sim.memory_allocated() == before
    assert torch.sim.max_memory_allocated() == before + 4096


def test_freed_memory_is_used_again() -> None:
    vendor_sim.fault("out_of_memory", value=torch.sim.memory_allocated() + 3 * 4096)
    kept = [torch.empty(1024, device="sim") for _ in range(2)]
    for _ in range(100):
        torch.empty(1024, device="sim")
    del kept[0]
    assert torch.empty(2048, device="sim").shape == (2048,), "two neighbours freed make one block"


def test_out_of_memory_is_torch_s_own_error() -> None:
    vendor_sim.fault("out_of_memory", value=torch.sim.memory_allocated() + 8128)
    with pytest.raises(torch.OutOfMemoryError, match="8192 bytes wanted"):
        torch.empty(2048, device="sim")
    assert torch.ones(1024, device="sim").sum().item() == 1024
