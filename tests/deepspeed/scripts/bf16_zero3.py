"""bfloat16 with ZeRO 3 and accumulation; saves a checkpoint."""

import os

import torch
from small import Classifier, batches

if os.environ.get("PEER") == "deepspeed":
    import deepspeed
else:
    import glm_core.deepspeed as deepspeed

config = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
torch.manual_seed(9)
model = Classifier()
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
losses, norms, rates = [], [], []
for batch in batches(12):
    loss = engine(batch["x"].bfloat16(), batch["labels"])["loss"]
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
    norms.append(engine.get_global_grad_norm())
    rates.extend(engine.get_lr())
engine.save_checkpoint(os.path.join(os.environ["CHECKPOINTS"], "bf16_zero3"), tag="end")
