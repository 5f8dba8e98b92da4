"""The script brings an optimizer with two groups and a schedule; ZeRO 1."""

import os

import torch
from small import Classifier, batches

if os.environ.get("PEER") == "deepspeed":
    import deepspeed
else:
    import glm_core.deepspeed as deepspeed

config = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 1.0,
}
torch.manual_seed(1)
model = Classifier()
decay = [p for p in model.parameters() if p.ndim > 1]
rest = [p for p in model.parameters() if p.ndim <= 1]
client = torch.optim.AdamW(
    [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 3e-3}],
    lr=1e-2,
)
schedule = torch.optim.lr_scheduler.LambdaLR(client, lambda step: 1 / (1 + step))
engine, _, _, schedule = deepspeed.initialize(
    model=model, optimizer=client, lr_scheduler=schedule, config_params=config
)
losses, norms, rates = [], [], []
for batch in batches(12):
    loss = engine(**batch)["loss"]
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
    norms.append(engine.get_global_grad_norm())
    rates.extend(engine.get_lr())
