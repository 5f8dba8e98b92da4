"""Everything comes from a JSON file and the command line: stage 0, Adam, warmup and decay."""

import argparse
import json
import os
import tempfile

import torch
from small import Classifier, batches

if os.environ.get("PEER") == "deepspeed":
    import deepspeed
else:
    import glm_core.deepspeed as deepspeed

config = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "optimizer": {
        "type": "Adam",
        "params": {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.01, "torch_adam": True},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": 12,
            "warmup_max_lr": 1e-2,
            "warmup_num_steps": 4,
            "warmup_type": "linear",
        },
    },
    "gradient_clipping": 0.3,
}
with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
    json.dump(config, file)
parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
args = parser.parse_args(["--deepspeed", "--deepspeed_config", file.name])
torch.manual_seed(2)
model = Classifier()
engine, optimizer, _, scheduler = deepspeed.initialize(
    args=args, model=model, model_parameters=model.parameters(), dist_init_required=False
)
losses, norms, rates = [], [], []
for batch in batches(12):
    loss = engine(**batch)["loss"]
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
    rates.append(scheduler.get_last_lr()[0])
