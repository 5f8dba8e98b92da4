"""Tests the queue: results exist only after synchronize, no wait is endless, errors come late."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import vendor_sim


def test_result_is_absent_until_synchronize() -> None:
    x = torch.ones(4, device="sim")
    torch.sim.synchronize()
    vendor_sim.fault("hang", op="aten::mul")
    x.mul_(3)
    assert torch.sim.pending() == 1
    assert _memory(x) == [1.0] * 4
    vendor_sim.clear_faults()
    torch.sim.synchronize()
    assert torch.sim.pending() == 0
    assert _memory(x) == [3.0] * 4


def _memory(x: torch.Tensor) -> list[float]:
    return torch.ops.sim.peek(x.data_ptr(), x.nbytes).view(torch.float32).tolist()


def test_copy_to_host_synchronizes() -> None:
    x = torch.ones(100, 100, device="sim")
    for _ in range(50):
        x = (x @ x) / 100
    assert torch.equal(x.cpu(), torch.ones(100, 100))
    assert torch.sim.pending() == 0


def test_host_may_change_its_tensor_right_after_the_copy() -> None:
    host, scalar = torch.ones(1000), torch.tensor(2.0)
    torch.zeros(1, device="sim")
    vendor_sim.fault("hang", op="sim::to_device")
    result = host.to("sim") * scalar
    host.zero_()
    scalar.zero_()
    vendor_sim.clear_faults()
    assert result.cpu().eq(2).all()


def test_a_copy_to_page_locked_memory_does_not_wait() -> None:
    x, host = torch.ones(4, device="sim"), torch.zeros(4).pin_memory()
    assert host.is_pinned()
    assert not torch.zeros(4).is_pinned()
    vendor_sim.fault("hang", op="sim::to_host")
    host.copy_(x, non_blocking=True)
    assert host.tolist() == [0.0] * 4
    vendor_sim.clear_faults()
    torch.sim.current_stream().record_event().synchronize()
    assert host.tolist() == [1.0] * 4


def test_order_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 50, generator=generator)
    y = x.to("sim")
    for i in range(200):
        for t in (x, y):
            t[i % 50] += t[(7 * i) % 50]
            t.mul_(0.9)
    assert torch.equal(y.cpu(), x)


def test_value_dependent_shapes_and_views() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    y = x.to("sim")
    assert torch.equal((y > 5).nonzero().cpu(), (x > 5).nonzero())
    assert torch.equal(y[y > 5].cpu(), x[x > 5])
    y.view(4, 3).select(0, 1)[::2] = -1
    y.unfold(0, 2, 1)[0, 0] = 9
    x.view(4, 3).select(0, 1)[::2] = -1
    x.unfold(0, 2, 1)[0, 0] = 9
    assert torch.equal(y.cpu(), x)


def test_out_argument_is_resized() -> None:
    out = torch.empty(0, device="sim")
    torch.add(torch.ones(5, device="sim"), 1, out=out)
    assert out.cpu().tolist() == [2.0] * 5


def test_kernel_error_is_raised_by_synchronize_once() -> None:
    table = torch.ones(3, 4, device="sim")
    torch.nn.functional.embedding(torch.tensor([9], device="sim"), table)
    with pytest.raises(IndexError, match="out of range"):
        torch.sim.synchronize()
    assert table.sum().item() == 12


def test_forked_process_is_refused() -> None:
    torch.ones(1, device="sim")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: forking with threads
        child = os.fork()
    if child == 0:
        try:
            torch.ones(1, device="sim")
        except RuntimeError as error:
            os._exit(7 if "forked" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_random_numbers_are_the_device_s_own_and_reproducible() -> None:
    torch.manual_seed(3)
    first = torch.randn(1000, device="sim")
    torch.manual_seed(3)
    again, later = torch.randn(1000, device="sim"), torch.randn(1000, device="sim")
    torch.manual_seed(3)
    host = torch.randn(1000)
    assert torch.equal(first.cpu(), again.cpu())
    assert not torch.equal(first.cpu(), later.cpu())
    assert not torch.equal(first.cpu(), host)
    assert abs(later.mean().item()) < 0.2
    assert abs(later.std().item() - 1) < 0.1


def test_random_state_is_saved_and_restored() -> None:
    torch.sim.manual_seed(5)
    torch.rand(3, device="sim")
    state = torch.sim.get_rng_state()
    expected = [torch.rand(3, device="sim").cpu(), torch.randperm(9, device="sim").cpu()]
    torch.sim.set_rng_state(state)
    received = [torch.rand(3, device="sim").cpu(), torch.randperm(9, device="sim").cpu()]
    assert all(map(torch.equal, expected, received))
    with pytest.raises(RuntimeError, match="16 bytes"):
        torch.sim.set_rng_state(torch.get_rng_state())


def test_generator_is_independent_of_the_default_one() -> None:
    state = torch.sim.get_rng_state()
    draws = [torch.rand(3, device="sim", generator=_seeded(s)).tolist() for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.sim.get_rng_state(), state)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator("sim").manual_seed(seed)


def test_device_module_says_what_torch_asks() -> None:
    module = torch.get_device_module("sim")
    assert module is torch.sim
    assert module.is_available()
    assert module.device_count() == 1
    assert module.current_device() == 0
    assert torch.accelerator.current_accelerator() == torch.device("sim")
    with pytest.raises(ValueError, match="sim:0 only"):
        module.set_device(1)
