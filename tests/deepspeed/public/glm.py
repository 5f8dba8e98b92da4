"""THUDM/GLM's own model, set-up, `train_step` and checkpoints: `glm.py CHECKOUT OUT` trains a tiny
block GLM in float16, with recomputation, and goes on from the checkpoint."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import deepspeed
import stand_ins
import torch

checkout, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)
stand_ins.no_gpu()
stand_ins.module("apex.optimizers", FusedAdam=torch.optim.AdamW)
stand_ins.module("apex.normalization.fused_layer_norm", FusedLayerNorm=torch.nn.LayerNorm)
stand_ins.module("tensorboardX", SummaryWriter=stand_ins.Quiet())
stand_ins.module("torch._six", inf=torch.inf)  # torch 1
stand_ins.module("data_utils.file_utils", cached_path=None)
sys.path.insert(0, str(checkout))
deepspeed.init_distributed("gloo")
import mpu  # noqa: E402

mpu.initialize_model_parallel(1)
import train_utils  # noqa: E402
import utils  # noqa: E402

config = json.loads((checkout / "config/config_block_base.json").read_text())
config |= {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
config["fp16"]["initial_scale_power"] = 8
config["optimizer"]["params"]["lr"] = 0.01
(out / "config.json").write_text(json.dumps(config))
switches = "pretrained_bert transformer_xl freeze_transformer masked_lm adapet finetune no_save_rng"
args = Namespace(
    **dict.fromkeys(
        f"{switches} no_load_optim no_load_rng no_load_lr_scheduler no_deepspeed_load".split(),
        False,
    ),
    **dict.fromkeys(("block_lm", "fp16", "deepspeed", "checkpoint_activations"), True),
    deepspeed_config=str(out / "config.json"),
    num_layers=2,
    vocab_size=64,
    hidden_size=32,
    num_attention_heads=2,
    hidden_dropout=0.1,
    attention_dropout=0.1,
    max_position_embeddings=16,
    mem_length=0,
    checkpoint_num_layers=1,
    attention_scale=1.0,
    prompt_func="lstm",
    tune_prefix_layers=None,
    fp32_allreduce=False,
    train_data=[],
    train_iters=6,
    lr=0.01,
    warmup=0.1,
    lr_decay_iters=None,
    lr_decay_style="cosine",
    lr_decay_ratio=0.1,
    gradient_accumulation_steps=2,
    world_size=deepspeed.comm.get_world_size(),
    model_parallel_size=1,
    save=str(out),
    load=str(out),
)
deepspeed.checkpointing.configure(mpu, deepspeed_config=args.deepspeed_config, num_checkpoints=2)
mpu.checkpoint = deepspeed.checkpointing.checkpoint
mpu.get_cuda_rng_tracker = deepspeed.checkpointing.get_cuda_rng_tracker
deepspeed.checkpointing.model_parallel_cuda_manual_seed(7)


def forward(data, model, args, timers, mems):
    tokens = next(data)
    positions = torch.stack((torch.arange(12), torch.zeros(12).long())).expand(2, 2, 12)
    logits, *mems = model(tokens, positions, torch.full((2,), 6), *mems)
    losses = mpu.vocab_parallel_cross_entropy(logits.contiguous().float(), tokens.roll(-1, 1))
    return losses.mean(), mems, "bert"


def train(updates, *, load):
    torch.manual_seed(5)
    model, optimizer, schedule = train_utils.setup_model_and_optimizer(args)
    if load:
        assert utils.load_checkpoint(model, optimizer, schedule, args) == 3
    optimizer.refresh_fp32_params()
    torch.manual_seed(6 + deepspeed.comm.get_rank())
    data = iter(torch.arange(12).expand(2, 12) + torch.randint(4, (99, 1, 1)))
    losses = []
    for _ in range(updates):
        step = (data, model, optimizer, schedule, args, stand_ins.Quiet(), forward)
        losses.append(train_utils.train_step(*step)[0].item())
    return model, optimizer, schedule, losses


model, optimizer, schedule, losses = train(3, load=False)
utils.save_checkpoint(3, model, optimizer, schedule, args)
more = train(3, load=True)[-1]
assert more[-1] < losses[0], (losses, more)
print("glm", optimizer.cur_scale, losses, more)
