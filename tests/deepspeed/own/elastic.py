"""Loads our checkpoints at every other ZeRO stage, and DeepSpeed's of ZeRO 1, 2 and 3 at every
stage. Masters, moments and counters must be equal bit by bit."""

import os

import torch
import torch.distributed as dist
from small import Classifier, batches

import glm_core.deepspeed as deepspeed
from glm_core.deepspeed import utils


def make(stage, seed):
    torch.manual_seed(seed)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
    }
    return deepspeed.initialize(model=Classifier(), config=config)[0]


def state(trained):
    keys = ("exp_avg", "exp_avg_sq")
    return {
        name: {
            "fp32": utils.safe_get_full_fp32_param(p),
            **{k: utils.safe_get_full_optimizer_state(p, k) for k in keys},
        }
        for name, p in trained.module.named_parameters()
    }


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[n][k], other[n][k]) for n in one for k in one[n]
    )


folder = os.environ["CHECKPOINTS"]
for old in range(4):
    trained = make(old, 51)
    for batch in batches(2):
        trained.backward(trained(**batch)["loss"])
        trained.step()
    place = os.path.join(folder, f"elastic{old}")
    trained.save_checkpoint(place, client_state={"old": old})
    want = state(trained)
    if dist.get_rank() == 0:
        torch.save(want, os.path.join(place, "state.pt"))
    assert not same(want, state(make(old, 51)) | {})
    for new in range(4):
        trained = make(new, 52)
        path, client = trained.load_checkpoint(place)
        assert client == {"old": old}
        assert trained.global_steps == 2
        assert same(state(trained), want), (old, new)

theirs = os.environ["FOREIGN"]
for old in (1, 2, 3):
    place = os.path.join(theirs, f"parts{old}")
    want = torch.load(os.path.join(place, "state.pt"))
    for new in range(4):
        trained = make(new, 53)
        # the files as they were written, or as DeepSpeed's ds_to_universal converted them
        where = place if new % 2 else os.path.join(place, "universal")
        path, client = trained.load_checkpoint(where, tag="end")
        assert path.endswith("end")
        assert trained.global_steps == 7
        assert same(state(trained), want), (old, new)
