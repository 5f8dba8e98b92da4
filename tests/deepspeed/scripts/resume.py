"""Trains half of the run, saves a checkpoint with client state, and trains the other half in a new
engine; ZeRO 1."""

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
folder = os.path.join(os.environ["CHECKPOINTS"], "resume")
losses, norms, rates = [], [], []


def make(seed):
    torch.manual_seed(seed)
    model = Classifier()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )
    return engine


def train(engine, data):
    for batch in data:
        loss = engine(**batch)["loss"]
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm()))
        rates.append(engine.get_lr()[0])


data = batches(12)
engine = make(6)
train(engine, data[:6])
engine.save_checkpoint(folder, client_state={"seen": 6})
engine = make(7)
path, client = engine.load_checkpoint(folder)
assert path is not None
assert client["seen"] == engine.global_steps == 6
train(engine, data[client["seen"] :])
