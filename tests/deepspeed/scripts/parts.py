"""Reads and changes masters, gradients and moments in the middle of training, changes the batch
size, and saves weights in the working dtype; ZeRO 1, 2 and 3."""

import os

import torch
from small import Classifier, batches

if os.environ.get("PEER") == "deepspeed":
    import deepspeed
else:
    import glm_core.deepspeed as deepspeed

losses, norms, rates = [], [], []


def make(stage):
    config = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.5,
    }
    torch.manual_seed(11)
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


for stage in (1, 2, 3):
    engine = make(stage)
    utils, data = deepspeed.utils, batches(10)
    train(engine, data[:2])
    weight = engine.module.head.weight
    loss = engine(**data[2])["loss"]
    engine.backward(loss)
    grad = utils.safe_get_full_grad(weight)
    losses.append(grad.norm().item())
    utils.safe_set_full_grad(weight, grad * 3)
    for key in ("exp_avg", "exp_avg_sq"):
        moment = utils.safe_get_full_optimizer_state(weight, key)
        losses.append(moment.norm().item())
        utils.safe_set_full_optimizer_state(weight, moment / 2, key)
    master = utils.safe_get_full_fp32_param(weight)
    utils.safe_set_full_fp32_param(weight, master * 1.5)
    engine.step()
    losses.append(utils.safe_get_full_fp32_param(weight).norm().item())
    train(engine, data[3:5])
    engine.set_train_batch_size(16)
    assert engine.gradient_accumulation_steps() == 2
    train(engine, data[5:9])
    assert engine.global_steps == 7
    folder = os.path.join(os.environ["CHECKPOINTS"], f"parts{stage}")
    engine.save_checkpoint(folder, tag="end")
    state = {
        name: {
            "fp32": utils.safe_get_full_fp32_param(p),
            **{k: utils.safe_get_full_optimizer_state(p, k) for k in ("exp_avg", "exp_avg_sq")},
        }
        for name, p in engine.module.named_parameters()
    }
    if torch.distributed.get_rank() == 0:
        torch.save(state, os.path.join(folder, "state.pt"))
    if stage < 3:
        engine.save_16bit_model(folder, "whole.bin")
        torch.distributed.barrier()
        whole = torch.load(os.path.join(folder, "whole.bin"))
        losses.append(sum(w.float().norm().item() for w in whole.values()))
