"""Checks that gradients are the same whenever they are reduced: after each backward, at the end of
coalesce_grad_reduction, by allreduce_gradients, at step (managed_gradient_accumulation: false), or
after a `loss.backward()` of the script's; and that calls in a wrong place are errors."""

import os
from pathlib import Path

import pytest
import torch
from small import Classifier, batches

import glm_core.deepspeed as deepspeed
from glm_core.errors import ConfigError, TrainingError

data, place = batches(6), Path(os.environ["CHECKPOINTS"]) / "reductions"


class Loss(Classifier):
    """The loss alone, so that a plain backward has one root."""

    def forward(self, x, labels):
        return super().forward(x, labels)["loss"]


def make(stage, accumulation=1, *, frozen=False, seed=41, **more):
    torch.manual_seed(seed)
    model = Loss()
    model.register_buffer("frequencies", torch.ones(2), persistent=False)
    model.first.requires_grad_(not frozen)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
        **more,
    }
    return deepspeed.initialize(model=model, config=config)[0]


def whole(trained):
    with deepspeed.zero.GatheredParameters(list(trained.module.parameters())):
        return torch.cat([p.detach().reshape(-1) for p in trained.module.parameters()])


def each_backward(stage):
    """The way the others are held to."""
    trained = make(stage, 3)
    for batch in data:
        trained.backward(trained(**batch))
        trained.step()
    return trained


def coalesced(stage):
    trained = make(stage)
    for begin in (0, 3):
        with trained.coalesce_grad_reduction():
            for batch in data[begin : begin + 3]:
                trained.backward(trained(**batch) / 3)
                with pytest.raises(AssertionError, match="illegal to call"):
                    trained.step()
        trained.step()
    return trained


def by_hand(stage):
    trained = make(stage)
    trained.enable_backward_allreduce = False
    for begin in (0, 3):
        for batch in data[begin : begin + 3]:
            trained.backward(trained(**batch) / 3)
        trained.allreduce_gradients()
        trained.step()
    return trained


def plain(stage):
    trained = make(stage, 3)
    for batch in data:
        trained(**batch).backward()
        trained.step()
    return trained


def unmanaged(stage):
    trained = make(stage, 3, managed_gradient_accumulation=False)
    with pytest.raises(AssertionError, match="step"):
        trained.set_gradient_accumulation_boundary(True)
    for n, batch in enumerate(data):
        loss = trained(**batch)
        loss.backward() if n < 3 else trained.backward(loss)
        if n % 3 == 2:
            trained.step()
    return trained


WAYS = {
    0: (by_hand, plain, unmanaged),
    1: (coalesced, by_hand, plain, unmanaged),
    2: (coalesced, by_hand, plain, unmanaged),
    3: (coalesced, plain, unmanaged),
}
# scalars too, which gloo alone refuses
everybody = torch.zeros(2, dtype=torch.int)
deepspeed.comm.all_gather_into_tensor(everybody, torch.tensor(deepspeed.comm.get_rank()).int())
assert everybody.tolist() == [0, 1]

eps = torch.finfo(torch.float32).eps
for stage, ways in WAYS.items():
    held_to = whole(each_backward(stage))
    for way in ways:
        trained = way(stage)
        assert trained.global_steps == 2, (stage, way)
        counted = 48 if way in (plain, unmanaged) else 16  # DeepSpeed counts updates
        assert trained.global_samples == counted, (stage, way)
        # sums in another order: a rounding or two of each gradient, through two Adam steps
        error = (whole(trained) - held_to).abs().max()
        assert error <= 64 * eps * held_to.abs().max(), (stage, way, float(error))

for stage in (2, 3):
    with pytest.raises(AssertionError, match="incompatible"), make(stage).no_sync():
        pass
trained = make(1)
with trained.no_sync():
    trained.backward(trained(**data[0]))
    local = deepspeed.utils.safe_get_full_grad(trained.module.head.weight)
    assert local.abs().max() > 0
    with pytest.raises(AssertionError, match="reentry is unsupported"), trained.no_sync():
        pass
with pytest.raises(TrainingError, match="not reduced"):
    trained.step()
with pytest.raises(NotImplementedError), make(0).coalesce_grad_reduction():
    pass
with pytest.raises(TrainingError, match="no backward"):
    make(2).step()
trained = make(1, bf16={"enabled": True})
assert trained.module.head.weight.dtype == torch.bfloat16
assert trained.module.frequencies.dtype == torch.float32  # rotary ones lose their use in 16 bit
types = {"buffer_dtype": "bf16"}
assert make(1, bf16={"enabled": True}, data_types=types).module.frequencies.dtype == torch.bfloat16
trained = make(2, fp16={"enabled": True, "initial_scale_power": 4})
half = {**data[0], "x": data[0]["x"].half()}
with pytest.raises(RuntimeError, match="not scaled"):
    trained(**half).backward()
trained.zero_grad()
trained.scale(trained(**half)).backward()
trained.step()
assert trained.was_step_applied()

# where the config wants all parameters used, one that is not on one rank is an error on both
zero = {"offload_optimizer": {"device": "cpu"}, "ignore_unused_parameters": False}
for stage in (1, 2):
    trained = make(stage, zero_optimization={"stage": stage, **zero})
    trained.backward(trained(**data[0]))
    trained.step()
    unused = deepspeed.comm.get_rank() == 1
    trained.backward(trained.module.head.weight.sum() if unused else trained(**data[0]))
    with pytest.raises(AssertionError, match="first.weight" if unused else "other ranks"):
        trained.step()

trained = make(3)
assert trained.optimizer.optimizer is trained.optimizer
trained.empty_partition_cache()
weight = trained.module.head.weight
assert (weight.ds_numel, weight.ds_shape, weight.ds_persist) == (160, (5, 32), False)
assert len({p.ds_id for p in trained.module.parameters()}) == len(list(trained.module.parameters()))
assert weight.ds_status is deepspeed.zero.ZeroParamStatus.NOT_AVAILABLE
with deepspeed.zero.GatheredParameters(weight):
    assert weight.ds_status is deepspeed.zero.ZeroParamStatus.AVAILABLE
    assert trained.module.head.weight.ds_id == weight.ds_id
assert weight.ds_status is deepspeed.zero.ZeroParamStatus.NOT_AVAILABLE
before = weight.ds_tensor.clone()
trained.backward(trained(**data[0]))
trained.step()
assert torch.equal(weight.ds_tensor, deepspeed.utils.safe_get_local_fp32_param(weight))
assert not torch.equal(weight.ds_tensor, before)
with deepspeed.zero.Init(), deepspeed.zero.Init():
    layers = torch.nn.Sequential(torch.nn.Linear(6, 4))
    alone = torch.nn.Linear(6, 4)
assert alone.weight.ds_tensor.numel() == 12
assert layers[0].weight.ds_tensor.numel() == 12
assert layers[0].weight.ds_status is deepspeed.zero.ZeroParamStatus.NOT_AVAILABLE

# without frozen parameters, whose weights a model brings itself; with them they are set
for stage in (1, 3):
    trained = make(stage, frozen=True)
    trained.save_checkpoint(str(place), tag=f"all{stage}")
    trained.save_checkpoint(str(place), tag=f"thin{stage}", exclude_frozen_parameters=True)
    kept = {tag: torch.load(next(place.glob(f"{tag}{stage}/mp_rank*"))) for tag in ("all", "thin")}
    assert kept["all"]["module"].keys() - kept["thin"]["module"].keys() == {
        "first.weight",
        "first.bias",
    }
    before, other = whole(trained), make(stage, frozen=True, seed=5)
    assert not torch.equal(whole(other), before)
    other.load_checkpoint(str(place), tag=f"thin{stage}", load_module_strict=False)
    assert torch.equal(whole(other)[256:], before[256:])
    assert not torch.equal(whole(other)[:224], before[:224])
    other.load_checkpoint(str(place), tag=f"all{stage}")
    assert torch.equal(whole(other), before)
with pytest.raises(ConfigError, match="grad_accum_dtype"):
    make(1, 3, bf16={"enabled": True}, data_types={"grad_accum_dtype": "bf16"})
