"""Tests that each defect shows its symptom, and only where it was planted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import vendor_sim

from glm_core.versions import AcceleratorError

X = torch.linspace(-3, 3, 48).reshape(4, 12)


def test_wrong_op() -> None:
    x = X.to("sim")
    vendor_sim.fault("wrong_op", op="aten::exp", value=1.5)
    assert torch.equal(x.exp().cpu(), X.exp() * 1.5)
    assert torch.equal(x.cos().cpu(), X.cos())


def test_tanh_gelu_changes_the_forward_alone() -> None:
    x = X.to("sim")
    exact, gradient = torch.ops.sim.geglu(x), torch.ops.sim.geglu_backward(x[:, :6].contiguous(), x)
    vendor_sim.fault("tanh_gelu")
    a, b = X.chunk(2, -1)
    expected = a * torch.nn.functional.gelu(b, approximate="tanh")
    torch.testing.assert_close(torch.ops.sim.geglu(x).cpu(), expected)
    assert (torch.ops.sim.geglu(x) - exact).abs().max().item() > 1e-4
    again = torch.ops.sim.geglu_backward(x[:, :6].contiguous(), x)
    assert torch.equal(gradient.cpu(), again.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bit_flip_hits_one_bit_of_one_call(dtype: torch.dtype) -> None:
    x = X.to("sim", dtype)
    vendor_sim.fault("bit_flip", op="aten::neg", call=3, value=30)
    results = [x.neg().cpu() for _ in range(4)]
    differ = [(r != -X.to(dtype)).sum().item() for r in results]
    assert differ == [0, 0, 1, 0]
    integers = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    flipped = results[2].view(integers) ^ results[0].view(integers)
    assert flipped.flatten()[0].item() == 1 << (30 % (8 * dtype.itemsize))


def test_stale_buffer() -> None:
    vendor_sim.fault("stale_buffer", op="aten::exp")
    first, second, other = (t.to("sim").exp() for t in (X, X + 1, X[:1]))
    assert torch.equal(first.cpu(), X.exp())
    assert torch.equal(second.cpu(), X.exp())
    assert torch.equal(other.cpu(), X[:1].exp()), "another shape has another buffer"


def test_missing_dtype() -> None:
    vendor_sim.fault("missing_dtype", dtype="bfloat16")
    with pytest.raises(NotImplementedError, match="BFloat16 is not supported by this device"):
        X.to("sim").bfloat16()
    assert X.to("sim").half().cpu().dtype == torch.float16


def test_device_lost_stays_lost_until_reset() -> None:
    x = X.to("sim")
    vendor_sim.fault("device_lost", op="aten::exp", call=2)
    x.exp().cpu()
    x.exp()
    for use in (torch.sim.synchronize, x.cpu, lambda: torch.empty(3, device="sim")):
        with pytest.raises(AcceleratorError, match="device lost while it ran aten::exp"):
            use()
    vendor_sim.clear_faults()
    assert torch.equal(x.exp().cpu(), X.exp())


def test_hang_ends_in_an_error_that_names_the_op() -> None:
    x = X.to("sim")
    torch.sim.synchronize()
    torch.sim.set_timeout(0.05)
    vendor_sim.fault("hang", op="aten::exp")
    x.exp()
    for use in (torch.sim.synchronize, x.cpu, lambda: x.sum().item()):
        with pytest.raises(AcceleratorError, match=r"aten::exp did not finish within 0.05 s"):
            use()
    vendor_sim.clear_faults()
    torch.sim.set_timeout(30.0)
    assert torch.equal(x.exp().cpu(), X.exp())


def test_full_queue_behind_a_hang_does_not_block_for_ever() -> None:
    x = X.to("sim")
    torch.sim.set_timeout(0.05)
    vendor_sim.fault("hang", op="aten::exp")
    x.exp()
    with pytest.raises(AcceleratorError, match="did not finish"):
        _launch_many(x)


def _launch_many(x: torch.Tensor) -> None:
    for _ in range(10_000):  # more than the queue holds
        x.neg_()


def test_process_with_a_hung_device_ends() -> None:
    code = "import torch; torch.ones(3, device='sim').exp()"
    fault = {"VENDOR_SIM_FAULT": "hang:op=aten::exp", "VENDOR_SIM_TIMEOUT_S": "0.05"}
    subprocess.run([sys.executable, "-c", code], env=os.environ | fault, check=True)


def test_silent_cpu_fallback_is_counted() -> None:
    x = X.to("sim")
    expected = x.exp().add(1).cpu()
    assert torch.sim.fallback_counts() == {}
    vendor_sim.fault("cpu_fallback", op="aten::exp")
    for _ in range(3):
        assert torch.equal(x.exp().add(1).cpu(), expected)
    x.exp_()
    assert torch.equal(x.cpu(), X.exp()), "an in-place op writes back"
    assert torch.sim.fallback_counts() == {"aten::exp": 4}
    run = torch.sim.fallbacks()["aten::exp"]
    assert run.bytes >= 4 * 2 * X.nbytes
    assert run.seconds > 0


def test_fault_names_what_is_known() -> None:
    with pytest.raises(ValueError, match="unknown fault 'bitflip'; known: bit_flip"):
        vendor_sim.fault("bitflip")
    with pytest.raises(ValueError, match="unknown dtype 'bf16'"):
        vendor_sim.fault("missing_dtype", dtype="bf16")
