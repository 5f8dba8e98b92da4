"""Accumulates gradients of four micro-batches and asks the engine for the boundary; cosine
schedule; ZeRO 2."""

import os

import torch
from small import Classifier, batches

if os.environ.get("PEER") == "deepspeed":
    import deepspeed
else:
    import glm_core.deepspeed as deepspeed

config = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": 6, "warmup_num_steps": 2},
    },
    "zero_optimization": {"stage": 2},
}
torch.manual_seed(3)
model = Classifier()
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
losses, norms, rates = [], [], []
for batch in batches(24):
    loss = engine(**batch)["loss"]
    scaled = engine.backward(loss)
    boundary = engine.is_gradient_accumulation_boundary()
    engine.step()
    losses.append(scaled.item())
    if boundary:
        norms.append(engine.get_global_grad_norm())
        rates.append(engine.get_lr()[0])
assert engine.global_steps == 6
