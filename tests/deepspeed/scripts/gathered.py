"""One rank sets gathered weights, as Hugging Face's `_init_weights` does; ZeRO 3."""

import os

import torch
import torch.distributed as dist
from small import Classifier, batches

if os.environ.get("PEER") == "deepspeed":
    import deepspeed
else:
    import glm_core.deepspeed as deepspeed

config = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
torch.manual_seed(13)
with deepspeed.zero.Init(config_dict_or_path=config):
    model = Classifier()
layers = [model.head.weight, model.blocks[1].linear.weight]
with deepspeed.zero.GatheredParameters(layers, modifier_rank=1):
    assert model.head.weight.shape == (5, 32)
    if dist.get_rank() == 1:
        model.head.weight.data.mul_(2)
        model.head.weight.data[1].zero_()
        torch.nn.init.normal_(model.blocks[1].linear.weight, std=0.1)
    else:
        model.head.weight.data.zero_()  # not the modifier: lost
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
losses, norms, rates = [], [], []
for batch in batches(12):
    loss = engine(**batch)["loss"]
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
    norms.append(float(engine.get_global_grad_norm()))
    rates.append(engine.get_lr()[0])
