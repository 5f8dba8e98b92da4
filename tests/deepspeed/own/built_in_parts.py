"""Checks zero.Init: the values are those without it, a rank needs less memory, and no change is
lost silently."""

import ctypes
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small import Classifier, batches
from torch import nn

import glm_core.deepspeed as deepspeed
from glm_core.distributed.split import Split
from glm_core.errors import GlmCoreError

LAYERS, WIDTH = 64, 512
WHOLE = LAYERS * WIDTH * WIDTH * 4


def peak_bytes():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


class Custom(nn.Module):
    """A module whose initial values come from its parts' constructors, its own constructor,
    `apply`, and assignments afterwards."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=1)
        self.inner = Classifier()
        self.scale = nn.Parameter(torch.rand(3, 2))
        self.scalar = nn.Parameter(torch.rand(()))
        self.frozen = nn.Parameter(torch.rand(5), requires_grad=False)
        nn.init.normal_(self.inner.head.weight, std=0.3)
        self.inner.first.weight.data.uniform_(-1, 1)
        self.inner.blocks[1].linear = nn.Linear(32, 32, bias=False)
        self.inner.blocks[0].linear.weight = self.inner.blocks[1].linear.weight
        self.apply(self._set)

    def _set(self, module):
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(0, 0.02)
            module.weight.data[module.padding_idx].zero_()


class Layer(nn.Module):
    """A layer that is built before the list it belongs to."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)


class BiasApart(nn.Linear):
    """Leaves the sum with the bias to its caller, as Megatron-LM's layers do."""

    def forward(self, inputs):
        return nn.functional.linear(inputs, self.weight), self.bias


def build(enabled):
    torch.manual_seed(21)
    with deepspeed.zero.Init(enabled=enabled):
        model = Custom()
    nn.init.trunc_normal_(model.inner.blocks[1].norm.weight)
    with torch.no_grad():
        torch._foreach_mul_([model.scale], 2.0)
    return model


dist.barrier()
whole, parted = build(False), build(True)
assert not any(isinstance(p, Split) for p in whole.parameters())
assert [n for n, p in parted.named_parameters() if not isinstance(p, Split)] == ["scalar"]
assert parted.inner.blocks[0].linear.weight is parted.inner.blocks[1].linear.weight
for (name, one), (other, two) in zip(
    whole.named_parameters(), parted.named_parameters(), strict=True
):
    assert name == other
    assert one.requires_grad == two.requires_grad
    assert torch.equal(one, two.gather_rows() if isinstance(two, Split) else two), name
with pytest.raises(GlmCoreError, match="GatheredParameters"):
    parted.embedding.weight.data[1].zero_()

# the same training as without it, in every stage (below 3 the parts are joined)
for stage in (1, 3):
    seen = []
    for enabled in (False, True):
        torch.manual_seed(22)
        with deepspeed.zero.Init(enabled=enabled):
            model = Classifier()
        client = torch.optim.AdamW(model.parameters(), lr=1e-2)
        config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}}
        trained, *_ = deepspeed.initialize(model=model, optimizer=client, config=config)
        for batch in batches(3):
            trained.backward(trained(**batch)["loss"])
            trained.step()
        with deepspeed.zero.GatheredParameters(list(trained.module.parameters())):
            seen.append([p.detach().clone() for p in trained.module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True)), stage

# a nested block's modules are in parts at its end, and may be trained before the outer one's
torch.manual_seed(23)
plain, inputs = nn.Linear(7, 5), torch.randn(4, 7)
config = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 3, "enable_sanity_checks": True},
}
with deepspeed.zero.Init(config_dict_or_path=config):
    with deepspeed.zero.Init(config_dict_or_path=config):
        tiled = deepspeed.zero.TiledLinear(7, 5, in_splits=2, out_splits=3, init_linear=plain)
        alone = nn.Linear(4, 4)
    assert isinstance(alone.weight, Split)
    trained, *_ = deepspeed.initialize(model=tiled, config=config)
apart = deepspeed.zero.TiledLinearReturnBias(
    7, 5, in_splits=2, out_splits=3, linear_cls=BiasApart, init_linear=plain
)
for result in (trained(inputs), sum(apart(inputs))):
    error = (result - plain(inputs)).abs().max()
    assert error <= 64 * torch.finfo(torch.float32).eps * plain(inputs).abs().max(), error
# with sanity checks a change that would be lost is an error on all ranks, before and after
for weight in (alone.weight, tiled.linears[0][0].weight):
    with deepspeed.zero.GatheredParameters(weight), torch.no_grad():
        weight.norm()
    gathered = deepspeed.zero.GatheredParameters(weight)
    gathered.__enter__()
    if dist.get_rank() == 1:
        weight.detach().add_(1)
    with pytest.raises(RuntimeError, match="in-place modification"):
        gathered.__exit__(None, None, None)
with pytest.raises(RuntimeError, match="in_splits=8; use 1 to 7"):
    deepspeed.zero.TiledLinear(7, 5, in_splits=8)

del whole, parted, model, client, trained, seen, tiled, alone, weight
ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed leaves the process at once
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = peak_bytes()
with deepspeed.zero.Init():
    large = nn.Sequential()
    large.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
built = peak_bytes() - before
with deepspeed.zero.GatheredParameters(large.layers[0].linear.weight):
    assert large.layers[0].linear.weight.norm() > 0
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
trained, *_ = deepspeed.initialize(model=large, config=config)
print(f"whole {WHOLE / 2**20:.0f} MiB, built {built / 2**20:.0f} MiB on a rank")
assert built < 0.75 * WHOLE, built
initialized = peak_bytes() - before
assert initialized < 1.25 * WHOLE, initialized  # its own rows twice, for a moment
