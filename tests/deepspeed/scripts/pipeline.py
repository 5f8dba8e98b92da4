"""DeepSpeedExamples' pipeline_parallelism: a list of layers, a loss function, the engine's own
data; two stages, ZeRO 0."""

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
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 5}},
    # where it clips, DeepSpeed's ZeRO 0 pipeline takes the norm of the first stage alone
    "gradient_clipping": 0.0,
    "steps_per_print": 100000,
}
deepspeed.runtime.utils.set_random_seed(20)
layers = [
    LayerSpec(nn.Linear, 7, 32),
    Block(),
    lambda x: x + 0.1,
    LayerSpec(nn.ReLU, inplace=True),
    LayerSpec(Block),
    LayerSpec(nn.Linear, 32, 5, bias=False),
]
model = PipelineModule(
    layers=layers,
    loss_fn=nn.CrossEntropyLoss(),
    num_stages=2,
    partition_method="parameters",
    activation_checkpoint_interval=0,
)
assert model.partitions() == [0, 4, 6]
engine, _, _, _ = deepspeed.initialize(
    model=model,
    model_parameters=[p for p in model.parameters() if p.requires_grad],
    training_data=Pairs(),
    config=config,
)
assert engine.is_first_stage() != engine.is_last_stage()
losses, norms, rates = [], [], []
for _ in range(12):
    loss = engine.train_batch()
    losses.append(loss.item())
    rates.extend(engine.get_lr())
rows = torch.utils.data.DataLoader(Pairs(), batch_size=4)
losses.append(engine.eval_batch(iter(rows)).item())
losses.append(engine.eval_batch(iter(rows), num_micro_batches=2).item())
losses.append(engine.train_batch().item())
