"""A loop as Hugging Face's: dict batches, and a model that returns its loss; ZeRO 2, warmup."""

import os

import torch
from small import Classifier, Rows

if os.environ.get("PEER") == "deepspeed":
    import deepspeed
else:
    import glm_core.deepspeed as deepspeed

config = {
    "train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 5}},
    "gradient_clipping": 0.5,
    "zero_optimization": {"stage": 2, "contiguous_gradients": True, "overlap_comm": False},
    "steps_per_print": 100000,
}
torch.manual_seed(0)
model = Classifier()
engine, optimizer, loader, scheduler = deepspeed.initialize(
    model=model, model_parameters=model.parameters(), config=config, training_data=Rows()
)
losses, norms, rates = [], [], []
for batch in loader:
    loss = engine(**batch)["loss"]
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
    norms.append(engine.get_global_grad_norm())
    rates.extend(engine.get_lr())
