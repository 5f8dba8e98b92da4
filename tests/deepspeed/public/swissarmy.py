"""SwissArmyTransformer's own `training_main`: `swissarmy.py OUT STAGE` trains a tiny model of its
base class and saves it."""

import sys
from pathlib import Path

import stand_ins
import torch

out, stage = Path(sys.argv[1]), sys.argv[2]
stand_ins.no_gpu()
absent = ("SummaryWriter", "rearrange", "repeat", "load_dataset")
for name in ("wandb", "datasets", "tensorboardX", "einops", "requests", "cpm_kernels"):
    stand_ins.module(
        name,
        SummaryWriter=stand_ins.Quiet(),
        rearrange=None,
        repeat=None,
        load_dataset=None,
        concatenate_datasets=None,
        interleave_datasets=None,
    )
names = "SimpleDistributedWebDataset MetaDistributedWebDataset ConfiguredResampledShards"
classes = {name: type(name, (), {}) for name in f"{names} DataPipeline".split()}
stand_ins.module("sat.data_utils.webds", alone=True, **classes)
from sat import get_args, mpu  # noqa: E402
from sat.model import BaseModel  # noqa: E402
from sat.training.deepspeed_training import training_main  # noqa: E402


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        return {"tokens": (torch.arange(12) + index) % 32}


def forward_step(data, model, args, timers):
    tokens = next(data)["tokens"]
    positions = torch.arange(12).expand_as(tokens)
    mask = torch.ones(12, 12).tril()[None, None].to(next(model.parameters()).dtype)
    logits, *_ = model(tokens, positions, mask)
    loss = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), tokens.roll(-1, 1).flatten()
    )
    return loss, {"again": loss}


words = f"""
--num-layers 2 --hidden-size 32 --num-attention-heads 2 --vocab-size 32 --max-sequence-length 16
--batch-size 2 --gradient-accumulation-steps 2 --train-iters 4 --lr 0.01 --mode pretrain --bf16
--log-interval 2 --distributed-backend gloo --zero-stage {stage} --num-workers 0
--train-data numbers --split 1 --save {out} --save-interval 4
"""
args = get_args(words.split())
args.device = "cpu"  # SAT itself takes a GPU only
model = training_main(
    args, model_cls=BaseModel, forward_step_function=forward_step,
    create_dataset_function=lambda path, args: Numbers(),
)  # fmt: skip
saved = next(out.glob("*/4/mp_rank_00_model_states.pt"))
assert torch.load(saved, weights_only=False)["module"]
print("sat", stage, mpu.get_data_parallel_rank(), saved)
