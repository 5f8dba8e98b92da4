"""accelerate's DeepSpeedPlugin: `accelerated.py STAGE OUT` trains with accumulation, clips, saves,
and loads its state."""

import os
import sys

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from torch.utils.data import DataLoader, TensorDataset

stage, out = int(sys.argv[1]), sys.argv[2]
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
plugin = DeepSpeedPlugin(zero_stage=stage, gradient_accumulation_steps=2, gradient_clipping=1.0)
accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin)
torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
x = torch.randn(32, 8)
data = DataLoader(TensorDataset(x, x[:, :4].argmax(-1)), batch_size=4)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
model, optimizer, data, schedule = accelerator.prepare(model, optimizer, data, schedule)


def epoch():
    losses = []
    for inputs, labels in data:
        with accelerator.accumulate(model):
            loss = torch.nn.functional.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()).mean().item())
    return losses


first = epoch()
accelerator.save_state(out)
second = epoch()
accelerator.load_state(out)
assert epoch() == second
assert sum(second) < sum(first)
weights = accelerator.get_state_dict(model) if stage < 3 else None
print("accelerate", stage, first[-1], second[-1], weights is None or len(weights))
