"""Continues resume.py from the checkpoint that the other package wrote."""

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
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 9}},
    "zero_optimization": {"stage": 1},
}
torch.manual_seed(10)
model = Classifier()
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
path, client = engine.load_checkpoint(os.path.join(os.environ["FOREIGN"], "resume"))
assert path is not None
assert client["seen"] == engine.global_steps == 6
losses, norms, rates = [], [], []
for batch in batches(12)[6:]:
    loss = engine(**batch)["loss"]
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
    norms.append(engine.get_global_grad_norm())
    rates.extend(engine.get_lr())
