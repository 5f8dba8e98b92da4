"""Sums gradients over ranks only after the last micro-batch (no_sync); ZeRO 0 and 1."""

import os

import torch
from small import Classifier, batches

if os.environ.get("PEER") == "deepspeed":
    import deepspeed
else:
    import glm_core.deepspeed as deepspeed

losses, norms, rates = [], [], []
for stage in (0, 1):
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
    }
    torch.manual_seed(12)
    model = Classifier()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )
    for n, batch in enumerate(batches(12)):
        boundary = n % 3 == 2
        engine.set_gradient_accumulation_boundary(boundary)
        if boundary:
            loss = engine(**batch)["loss"]
            engine.backward(loss)
            engine.step()
            if stage:  # DeepSpeed has no norm in stage 0
                norms.append(float(engine.get_global_grad_norm()))
            rates.append(engine.get_lr()[0])
        else:
            with engine.no_sync():
                loss = engine(**batch)["loss"]
                engine.backward(loss)
        losses.append(loss.item())
    assert engine.global_steps == 4
