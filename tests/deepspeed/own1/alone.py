"""Loads on one process the checkpoints that own/elastic.py wrote on two: masters and moments must
be equal bit by bit."""

import os

import torch
import torch.distributed as dist
from small import Classifier

import glm_core.deepspeed as deepspeed
from glm_core.deepspeed import utils

assert dist.get_world_size() == 1
for old in range(4):
    place = os.path.join(os.environ["FOREIGN"], f"elastic{old}")
    want = torch.load(os.path.join(place, "state.pt"))
    for new in range(4):
        torch.manual_seed(54)
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            "zero_optimization": {"stage": new},
        }
        trained, *_ = deepspeed.initialize(model=Classifier(), config=config)
        path, client = trained.load_checkpoint(place)
        assert client == {"old": old}
        assert trained.global_steps == 2
        for name, p in trained.module.named_parameters():
            values = {
                "fp32": utils.safe_get_full_fp32_param(p),
                **{k: utils.safe_get_full_optimizer_state(p, k) for k in ("exp_avg", "exp_avg_sq")},
            }
            for key, value in values.items():
                assert torch.equal(value, want[name][key]), (old, new, name, key)
