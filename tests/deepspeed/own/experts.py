"""Checks that ZeRO 3 gathers a marked module as one, where each rank runs another of its experts,
and that torch.func sees the module's own gradients."""

import pytest
import torch

import glm_core.deepspeed as deepspeed
from glm_core.deepspeed.utils import get_z3_leaf_modules, set_z3_leaf_modules, unset_z3_leaf_modules

rank = deepspeed.comm.get_rank()


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.head = torch.nn.Linear(4, 1)

    def forward(self, x, chosen=rank):
        return self.head(self.experts[chosen](x)).sum()


def config(stage, **more):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **more},
    }


inputs = torch.arange(8.0).view(2, 4)
reference = Experts()
sgd = torch.optim.SGD(reference.parameters(), lr=0.1)
for _ in range(2):
    (sum(reference(inputs[r : r + 1], r) for r in range(2)) / 2).backward()
    sgd.step()
    sgd.zero_grad()

for marked in ("by call", "by config"):
    model, section = Experts(), {}
    if marked == "by call":
        assert set_z3_leaf_modules(model, [torch.nn.ModuleList]) == [model.experts]
        assert unset_z3_leaf_modules(model, [torch.nn.ModuleList]) == [model.experts]
        assert not get_z3_leaf_modules(model)
        set_z3_leaf_modules(model, [Experts])
    else:
        section = {"leaf_module": {"names": [""]}}
    trained = deepspeed.initialize(model=model, config=config(3, **section))[0]
    for _ in range(2):
        trained.backward(trained(inputs[rank : rank + 1]))
        trained.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight, reference.get_parameter(name))
with pytest.raises(ValueError, match="has none of"):
    set_z3_leaf_modules(Experts(), [torch.nn.Conv2d])

for stage in (0, 2):
    trained = deepspeed.initialize(
        model=Experts(), config={**config(stage), "gradient_accumulation_steps": 4}
    )[0]
    own = torch.func.grad(trained)(inputs[:1])  # no backward of the run's: not divided by 4
    assert torch.equal(own, torch.func.grad(trained.module)(inputs[:1]))
    tied = trained.optimizer
    assert (tied.overflow, tied.cur_scale) == (False, 1.0)
    with torch.no_grad():
        trained.module.head.bias.fill_(7)
    tied.refresh_fp32_params()
    assert deepspeed.utils.safe_get_full_fp32_param(trained.module.head.bias).item() == 7
