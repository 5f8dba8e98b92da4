"""A pipeline of four stages, more than it has micro-batches; every layer is seeded; ZeRO 0."""

import os

import torch
from small import Block, Pairs
from torch import nn

if os.environ.get("PEER") == "deepspeed":
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule
else:
    import glm_core.deepspeed as deepspeed
    from glm_core.deepspeed.pipe import LayerSpec, PipelineModule

config = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 3,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "gradient_clipping": 0.0,
}
layers = [
    LayerSpec(nn.Linear, 7, 32),
    LayerSpec(Block),
    LayerSpec(nn.ReLU, inplace=True),
    *(LayerSpec(Block) for _ in range(2)),
    LayerSpec(nn.Dropout, 0.2),
    LayerSpec(nn.Linear, 32, 5),
]
model = PipelineModule(
    layers,
    num_stages=4,
    loss_fn=nn.CrossEntropyLoss(),
    partition_method="uniform",
    seed_layers=True,
    base_seed=77,
)
assert model.parts == [0, 2, 4, 6, 7]
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
losses, norms, rates = [], [], []
data = iter(deepspeed.utils.RepeatingLoader(torch.utils.data.DataLoader(Pairs(), batch_size=4)))
for _ in range(12):
    losses.append(engine.train_batch(data).item())
    rates.extend(engine.get_lr())
