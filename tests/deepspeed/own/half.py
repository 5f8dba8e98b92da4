"""Checks float16, which DeepSpeed refuses on the CPU: loss scales, skipped steps and weights of two
ranks in every stage against one loop written out here."""

import os

import pytest
import torch
import torch.distributed as dist
from small import Classifier, batches

import glm_core.deepspeed as deepspeed
from glm_core.errors import ConfigError

STEPS, CLIP, POWER, WINDOW = 14, 0.5, 20, 3
ranks = dist.get_world_size()


def rows(rank):
    return [{"x": b["x"].half(), "labels": b["labels"]} for b in batches(STEPS, rank=rank)]


def by_hand():
    """Trains one process on all ranks' data. An overflow skips the update and halves the scale;
    WINDOW good steps double it (hysteresis 1)."""
    torch.manual_seed(31)
    model = Classifier().half()
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-2)
    scale, good, losses, scales, norms = 2.0**POWER, -1, [], [], []
    for step in range(STEPS):
        for rank in range(ranks):
            loss = model(**rows(rank)[step])["loss"]
            (loss.float() * scale).backward()
            losses += [loss.item()] if rank == dist.get_rank() else []
            for p, master in zip(model.parameters(), masters, strict=True):
                grad = p.grad.float() / ranks
                master.grad = grad if master.grad is None else master.grad + grad
                p.grad = None
        norm = torch.stack([m.grad.norm() for m in masters]).norm() / scale
        if norm.isfinite():
            for m in masters:
                m.grad *= min(1.0, CLIP / (norm + 1e-6)) / scale
            optimizer.step()
            good += 1
            scale = scale * 2 if good and good % WINDOW == 0 else scale
        else:
            scale, good = scale / 2, -1
        optimizer.zero_grad()
        with torch.no_grad():
            for p, master in zip(model.parameters(), masters, strict=True):
                p.copy_(master)
        scales.append(scale)
        norms.append(float(norm))
    return losses, scales, norms


losses, scales, norms = by_hand()
skipped = sum(not torch.tensor(n).isfinite() for n in norms)
assert 0 < skipped < STEPS - 6, norms
for stage in range(4):
    torch.manual_seed(31)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "fp16": {
            "enabled": True,
            "initial_scale_power": POWER,
            "loss_scale_window": WINDOW,
            "hysteresis": 1,
        },
    }
    model = Classifier()
    trained, *_ = deepspeed.initialize(
        model=model, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), config=config
    )
    assert trained.fp16_enabled()
    weight = trained.module.head.weight
    for step, batch in enumerate(rows(dist.get_rank())):
        loss = trained(**batch)["loss"]
        trained.backward(loss)
        grad = deepspeed.utils.safe_get_full_grad(weight)
        deepspeed.utils.safe_set_full_grad(weight, grad)
        trained.step()
        applied = bool(torch.tensor(norms[step]).isfinite())
        assert trained.was_step_applied() == applied, (stage, step)
        assert trained.loss_scale() == trained.cur_scale == scales[step], (stage, step)
        # one rounding of a float16 weight is allowed to each step so far
        eps = torch.finfo(torch.float16).eps
        assert abs(loss.item() - losses[step]) <= (1 + step) * eps * losses[step], (stage, step)
        if applied:
            near = abs(trained.get_global_grad_norm() - norms[step]) / norms[step]
            assert near <= (1 + step) * 4 * eps, (stage, step, near)
            assert grad.isfinite().all()
    assert trained.skipped_steps == skipped
    assert trained.global_steps == STEPS

# a resumed dynamic scale goes on as it was; where one of the two is fixed only the value is taken
folder = os.path.join(os.environ["CHECKPOINTS"], "half")
trained.save_checkpoint(folder, tag="dynamic")
dynamic = trained.scaler


def resumed(tag, **fp16):
    again, *_ = deepspeed.initialize(
        model=Classifier(),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        config={**config, "fp16": {"enabled": True, **fp16}},
    )
    again.load_checkpoint(folder, tag=tag)
    return again


assert resumed("dynamic").scaler == dynamic
fixed = resumed("dynamic", loss_scale=8.0)
assert (fixed.dynamic_loss_scale(), fixed.loss_scale()) == (False, dynamic.scale)
fixed.save_checkpoint(folder, tag="fixed")
again = resumed("fixed", loss_scale_window=7)
assert (again.scaler.window, again.loss_scale()) == (7, dynamic.scale)

with pytest.raises(ConfigError, match="whole parameters"):
    deepspeed.initialize(model=Classifier(), optimizer=torch.optim.LBFGS, config=config)
