"""Checks ZeRO 3's local parts, changes inside GatheredParameters, and optimizers that need whole
parameters."""

import pytest
import torch
import torch.distributed as dist
from small import Classifier, batches

import glm_core.deepspeed as deepspeed
from glm_core.deepspeed import utils
from glm_core.deepspeed.runtime.utils import PartitionedTensor
from glm_core.errors import ConfigError, ShapeError

me, data = dist.get_rank(), batches(6)


def make(stage, accumulation=1, **more):
    torch.manual_seed(41)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
        **more,
    }
    return deepspeed.initialize(model=Classifier(), config=config)[0]


def everybody(part):
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return torch.cat(parts)


def whole(trained):
    with deepspeed.zero.GatheredParameters(list(trained.module.parameters())):
        return [p.detach().clone() for p in trained.module.parameters()]


trained = make(3)
weight = trained.module.head.weight
trained.backward(trained(**data[0])["loss"])
trained.step()
trained.backward(trained(**data[1])["loss"])
pairs = [
    (utils.safe_get_local_fp32_param(weight), utils.safe_get_full_fp32_param(weight)),
    (utils.safe_get_local_grad(weight), utils.safe_get_full_grad(weight)),
    *(
        (
            utils.safe_get_local_optimizer_state(weight, key),
            utils.safe_get_full_optimizer_state(weight, key),
        )
        for key in ("exp_avg", "exp_avg_sq")
    ),
]
for local, full in pairs:
    assert torch.equal(everybody(local.clone()), full.reshape(-1))
utils.safe_set_local_fp32_param(weight, pairs[0][0] * 2)
assert torch.equal(utils.safe_get_full_fp32_param(weight), pairs[0][1] * 2)
utils.safe_set_local_grad(weight, pairs[1][0] * 3)
assert torch.equal(utils.safe_get_full_grad(weight), pairs[1][1] * 3)
utils.safe_set_local_optimizer_state(weight, pairs[2][0] * 4, "exp_avg")
assert torch.equal(utils.safe_get_full_optimizer_state(weight, "exp_avg"), pairs[2][1] * 4)
utils.safe_update_full_grad_vectorized([weight], lambda grad, p: grad * 2 + p.ndim)
assert torch.equal(utils.safe_get_full_grad(weight), pairs[1][1] * 3 * 2 + 2)
with pytest.raises(ConfigError, match="received 1"):
    utils.safe_set_local_grad(weight, torch.zeros(1))

# gathered: the module's attributes, of the rank that may change them
before = whole(trained)
with deepspeed.zero.GatheredParameters(weight):
    trained.module.head.weight.data.zero_()
assert all(torch.equal(a, b) for a, b in zip(before, whole(trained), strict=True))
with deepspeed.zero.GatheredParameters(weight, modifier_rank=1):
    trained.module.head.weight.data.fill_(me + 5.0)
assert utils.safe_get_full_fp32_param(weight).eq(6.0).all()
# a parameter that the script holds is whole too: so scripts save ZeRO 3's weights
with deepspeed.zero.GatheredParameters(weight):
    kept = weight.data.cpu()
assert type(kept) is torch.Tensor
assert kept.shape == (5, 32)
assert kept.eq(6.0).all()
with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
    weight.data.zero_()
assert utils.safe_get_full_fp32_param(weight).eq(0).all()

# a tensor in shares, here of 8 and 7 elements
tensor = torch.arange(15.0).view(5, 3)
shares = PartitionedTensor(tensor, dist.group.WORLD)
assert shares.local_size() == (8 - me,)
again = PartitionedTensor.from_meta(shares.to_meta(), shares.data(), dist.group.WORLD)
assert torch.equal(again.full(), tensor)
with pytest.raises(ShapeError, match="not"):
    PartitionedTensor.from_meta(shares.to_meta(), shares.data()[1:], dist.group.WORLD)

for stage in (1, 2):
    with pytest.raises(ConfigError, match="safe_get_full"):
        utils.safe_get_local_grad(make(stage).module.head.weight)

eps = torch.finfo(torch.float32).eps
# norms of whole parameters: where they are cut by rows as where they are not
results = []
for stage in (0, 3):
    lamb = {"type": "Lamb", "params": {"lr": 1e-2, "weight_decay": 0.1}}
    trained = make(stage, optimizer=lamb)
    for batch in data:
        trained.backward(trained(**batch)["loss"])
        trained.step()
    results.append(torch.cat([w.reshape(-1) for w in whole(trained)]))
assert (results[0] - results[1]).abs().max() <= 64 * eps * results[0].abs().max()
with pytest.raises(ConfigError, match="whole parameters"):
    make(2, optimizer=lamb)
