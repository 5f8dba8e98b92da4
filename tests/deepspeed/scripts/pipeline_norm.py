"""Shows that DeepSpeed's ZeRO 0 pipeline clips by the norm of the first stage alone: with that norm
in place of ours the runs are equal. No user would write this script."""

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
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.3}},
    "gradient_clipping": 0.1,
}


def of_the_first_stage(parts):
    norm = torch.stack([tensor.norm() for tensor, _ in parts]).norm()
    torch.distributed.broadcast(norm, 0)
    return norm


torch.manual_seed(26)
layers = [
    LayerSpec(nn.Linear, 7, 32),
    LayerSpec(Block),
    LayerSpec(Block),
    LayerSpec(nn.Linear, 32, 5),
]
model = PipelineModule(layers, num_stages=2, loss_fn=nn.CrossEntropyLoss())
engine, *_ = deepspeed.initialize(
    model=model, model_parameters=model.parameters(), config=config, training_data=Pairs()
)
if os.environ.get("PEER") != "deepspeed":
    engine._sum_norm = of_the_first_stage
losses, norms, rates = [], [], []
for _ in range(12):
    losses.append(engine.train_batch().item())
    rates.extend(engine.get_lr())
