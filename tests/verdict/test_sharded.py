"""What FSDP copies between its buffers and the weights is judged."""

import pytest
import torch

from glm_core.verdict import references
from glm_core.verdict.judge import judge
from glm_core.verdict.oracle import Call, results

fsdp = pytest.importorskip("torch.distributed.fsdp")
Z = 6.0


def of(name: str) -> object:
    packet = getattr(torch.ops.fsdp, name, None)
    if packet is None:
        pytest.skip(f"torch {torch.__version__} has no fsdp::{name}")
    return packet.default


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_are_copied_to_the_wrong_place_are_wrong(dtype: torch.dtype) -> None:
    func = of("split_with_sizes_copy")
    assert not references.why_not(func)
    gathered = torch.randn(2, 12).to(dtype)  # two ranks
    out = [torch.zeros(2, n, dtype=dtype) for n in (4, 8)]
    args, kwargs = (gathered, [4, 8], 1), {"out": [x.clone() for x in out]}
    func(*args, out=out)  # type: ignore[operator]  # an operator
    call = Call(func, args, kwargs, "cpu")
    right = results(func, args, {"out": out}, None)
    assert not judge(call, right, Z).outside
    wrong = {"out": right["out"].roll(1)}
    assert judge(call, wrong, Z).outside


def test_what_a_rank_sends_of_its_weights_is_judged() -> None:
    parts = [torch.randn(3), torch.randn(5)]
    [sent] = references.GIVEN["fsdp::all_gather_copy_in"](parts, torch.empty(16), [3, 5], 8, 1)
    assert torch.equal(sent, torch.cat(parts))
