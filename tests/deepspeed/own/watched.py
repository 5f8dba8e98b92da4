"""Checks what a config makes a run report (rates as CSV, FLOPs, times, progress), and what is saved
only on request."""

import contextlib
import importlib.util
import io
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small import Classifier, batches

import glm_core.deepspeed as deepspeed
from glm_core.deepspeed.checkpoint import ds_to_universal, layouts
from glm_core.deepspeed.monitor.monitor import Monitor
from glm_core.errors import CheckpointError, ConfigError

place = Path(os.environ["CHECKPOINTS"])
me = dist.get_rank()


def make(**more):
    torch.manual_seed(61)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        **more,
    }
    return deepspeed.initialize(model=Classifier(), config=config)[0]


printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    trained = make(
        wall_clock_breakdown=True,
        steps_per_print=2,
        csv_monitor={"enabled": True, "output_path": str(place / "csv"), "job_name": "run"},
        flops_profiler={
            "enabled": True,
            "profile_step": 2,
            "output_file": str(place / "flops.txt"),
        },
        fp16={"enabled": True, "initial_scale_power": 4},
    )
    for batch in batches(4):
        trained.backward(trained(batch["x"].half(), batch["labels"])["loss"])
        trained.step()
lines = printed.getvalue().splitlines()
if me == 0:
    times = [
        t for t in lines if re.match(r"time \(ms\) \| forward: [\d.]+ \| backward: .*step:", t)
    ]
    assert len(times) == 4
    assert [t.partition(",")[0] for t in lines if t.startswith("step=")] == ["step=2", "step=4"]
    rates = (place / "csv/run/Train_Samples_lr.csv").read_text().split()
    assert rates == ["step,lr", "8,0.01", "16,0.01", "24,0.01", "32,0.01"]
    scales = (place / "csv/run/Train_Samples_loss_scale.csv").read_text().split()
    assert scales[1:] == [f"{n},16.0" for n in (8, 16, 24, 32)]
    # 2 x rows x inputs x outputs for each product of one forward
    flops = 2 * 4 * (7 * 32 + 2 * 32 * 32 + 32 * 5)
    report = (place / "flops.txt").read_text()
    assert f"forward {flops} FLOPs on this rank, step 2" in report
    assert f"Classifier.head: {2 * 4 * 32 * 5}" in report
else:
    assert lines == []

if importlib.util.find_spec("tensorboard") is None and me == 0:
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        Monitor({"tensorboard": {"enabled": True, "output_path": str(place / "tb")}})

# ZeRO 3 gathers for a whole file only where the config asks for it
trained = make(zero_optimization={"stage": 3})
assert not trained.save_16bit_model(str(place / "not"))
assert not (place / "not").exists()
trained = make(zero_optimization={"stage": 3, "stage3_gather_16bit_weights_on_model_save": True})
assert trained.save_16bit_model(str(place / "whole"), "w.bin")
whole = torch.load(place / "whole/w.bin")
torch.manual_seed(61)
for name, value in Classifier().state_dict().items():
    assert torch.equal(whole[name], value), name

# a universal checkpoint from one of ours
trained = make(zero_optimization={"stage": 2})
for batch in batches(2):
    trained.backward(trained(**batch)["loss"])
    trained.step()
trained.save_checkpoint(str(place / "two"), tag="end", client_state={"note": "kept"})
if me == 0:
    words = ["--input_folder", str(place / "two/end"), "--output_folder", str(place / "uni/end")]
    ds_to_universal.main(words)
    mine, other = (layouts.read(place / p / "end", 0, []) for p in ("two", "uni"))
    assert mine.state.keys() == other.state.keys()
    for name, values in mine.state.items():
        for key in ("fp32", "exp_avg", "exp_avg_sq"):
            assert torch.equal(values[key], other.state[name][key].reshape(-1)), (name, key)
    assert other.client == {"note": "kept"}
    assert other.counters == mine.counters
dist.barrier()
trained = make(checkpoint={"load_universal": True}, zero_optimization={"stage": 3})
path, client = trained.load_checkpoint(str(place / "uni"))
assert path.endswith("end")
assert trained.global_steps == 2
with pytest.raises(CheckpointError, match="latest_universal"):
    trained.load_checkpoint(str(place / "two"))
