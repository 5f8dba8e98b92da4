"""Trains partitioned parameters and reads them while they are gathered; ZeRO 3."""

import os

import torch
from small import Classifier, batches

if os.environ.get("PEER") == "deepspeed":
    import deepspeed
else:
    import glm_core.deepspeed as deepspeed

config = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "gradient_clipping": 0.5,
}
torch.manual_seed(5)
model = Classifier()
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
with deepspeed.zero.GatheredParameters(engine.module.head.weight):
    assert engine.module.head.weight.shape == (5, 32)
losses, norms, rates = [], [], []
for batch in batches(12):
    loss = engine(**batch)["loss"]
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
    norms.append(engine.get_global_grad_norm())
    rates.extend(engine.get_lr())
engine.save_checkpoint(os.path.join(os.environ["CHECKPOINTS"], "zero3"))
