"""Loads a universal checkpoint that glm_core wrote in ZeRO 1, 2 and 3, and trains on."""

import os
from pathlib import Path

import torch
from small import Classifier, batches, made_state

if os.environ.get("PEER") == "deepspeed":
    import deepspeed
else:
    import glm_core.deepspeed as deepspeed

losses, norms, rates = [], [], []
for stage in (1, 2, 3):
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "checkpoint": {"load_universal": True},
    }
    model = Classifier()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )
    path, client = engine.load_checkpoint(str(Path(os.environ["CHECKPOINTS"]).parent / "made"))
    assert client["seen"] == 5
    assert engine.global_steps == 4
    utils, made = deepspeed.utils, made_state()
    for name, p in engine.module.named_parameters():
        assert torch.equal(utils.safe_get_full_fp32_param(p), made[name]["fp32"]), name
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(utils.safe_get_full_optimizer_state(p, key), made[name][key]), name
    for batch in batches(4):
        loss = engine(**batch)["loss"]
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm()))
        rates.append(engine.get_lr()[0])
