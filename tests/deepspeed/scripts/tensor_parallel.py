"""Splits a layer's columns and rows as Megatron does, with an mpu that names the ranks that share
them; ZeRO 1."""

import os

import torch
import torch.distributed as dist
from small import batches
from torch import nn

if os.environ.get("PEER") == "deepspeed":
    import deepspeed
else:
    import glm_core.deepspeed as deepspeed


class Mpu:
    """An mpu in which both processes share every layer."""

    def __init__(self):
        self.ranks = dist.get_world_size()
        self.model = dist.new_group(list(range(self.ranks)))
        groups = [dist.new_group([r]) for r in range(self.ranks)]
        self.data = groups[dist.get_rank()]

    def get_model_parallel_group(self):
        return self.model

    def get_model_parallel_rank(self):
        return dist.get_rank()

    def get_model_parallel_world_size(self):
        return self.ranks

    def get_data_parallel_group(self):
        return self.data

    def get_data_parallel_rank(self):
        return 0

    def get_data_parallel_world_size(self):
        return 1


class Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


class Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 16)
        self.up = nn.Linear(16, 12, bias=False)
        self.down = nn.Linear(12, 16, bias=False)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)
        for p in (self.up.weight, self.down.weight):
            p.model_parallel = p.tensor_model_parallel = True

    def forward(self, x, labels):
        x = self.first(x)
        x = self.norm(x + Total.apply(self.down(torch.tanh(self.up(Copy.apply(x))))))
        return nn.functional.cross_entropy(self.head(x), labels)


config = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "gradient_clipping": 0.2,
}
torch.manual_seed(14)
model = Parallel()
torch.manual_seed(15 + dist.get_rank())
nn.init.normal_(model.up.weight, std=0.2)
nn.init.normal_(model.down.weight, std=0.2)
engine, *_ = deepspeed.initialize(
    model=model, model_parameters=model.parameters(), config=config, mpu=Mpu()
)
losses, norms, rates = [], [], []
for batch in batches(12):
    for value in batch.values():
        dist.broadcast(value, 0)
    loss = engine(**batch)
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
    norms.append(float(engine.get_global_grad_norm()))
    rates.append(engine.get_lr()[0])
