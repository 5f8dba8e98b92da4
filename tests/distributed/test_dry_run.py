"""One rank of GLM-130B's 768, nothing of it materialised: shapes, and who talks to whom."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_mesh import fake_job
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import CommDebugMode

from glm_core.config import ModelConfig
from glm_core.distributed import apply, mesh
from glm_core.distributed.apply import Share
from glm_core.distributed.plan import Plan
from glm_core.model.presets import preset

LENGTH = 8


def dry(config: ModelConfig, plan: Plan, made: DeviceMesh) -> tuple[Share, tuple[Tensor, Tensor]]:
    """A stage between the first and the last, forward and backward."""
    share = apply.build(config, plan, made, None, torch.device("cpu"), torch.float16)
    shape = (1, LENGTH // 4 if plan.sp else LENGTH, config.hidden)
    carried = (torch.empty(shape, dtype=torch.float16, requires_grad=True) for _ in range(2))
    rows = torch.zeros(1, LENGTH, dtype=torch.int64)
    out = share.stages[0](
        *carried,
        tokens=rows,
        positions=torch.zeros(1, 2, LENGTH, dtype=torch.int64),
        key_start=rows.int(),
        key_end=rows.int() + 1,
        labels=rows,
        token_weight=rows.float(),
    )
    (out[0].sum() + out[1].sum()).backward()
    return share, out


@pytest.mark.parametrize("sp", [False, True])
def test_a_rank_of_glm_130b_computes_its_layers(sp: bool) -> None:
    config = dataclasses.replace(preset("glm-130b"), num_layers=16)
    plan = Plan(tp=4, pp=8, dp=24, micro_batches=1, sp=sp)
    with fake_job(100, 768):  # second stage, second data-parallel rank
        made = mesh.make(plan, "cpu")
        with FakeTensorMode(allow_non_fake_inputs=True), CommDebugMode() as talk:
            share, out = dry(config, plan, made)
    layers = list(share.stages[0].blocks)
    counts = {str(op).rpartition(".")[2]: n for op, n in talk.get_comm_counts().items()}
    assert layers == ["1", "2"]
    assert out[0].shape == out[1].shape == (1, LENGTH // 4 if sp else LENGTH, 12288)
    assert share.get_parameter("0.blocks.2.attention.qkv.weight").shape == (9216, 12288)
    assert share.get_parameter("0.blocks.2.mlp.down.weight").shape == (12288, 8192)
    each = 4 * len(layers)  # two branches, forward and backward
    if sp:
        assert counts == {"all_gather_into_tensor": each, "reduce_scatter_tensor": each}
    else:
        assert counts == {"all_reduce": each}
