"""transformers' Trainer with a DeepSpeed config: `trainer.py STAGE OUT` trains, saves and
resumes."""

import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

STAGE, OUT = int(sys.argv[1]), Path(sys.argv[2])


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = (torch.arange(12) * (index + 1)) % 32
        return {"input_ids": ids, "labels": ids}


def make(**more):
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
                "total_num_steps": "auto",
            },
        },
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": STAGE,
            "offload_optimizer": {"device": "none"},
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }
    arguments = TrainingArguments(
        output_dir=str(OUT),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        warmup_steps=1,
        deepspeed=config,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **more,
    )
    torch.manual_seed(3)
    size = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=32, n_positions=16)
    return Trainer(model=GPT2LMHeadModel(size), args=arguments, train_dataset=Data())


trainer = make()
trainer.train()
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
assert len(losses) == 4, losses
assert losses[-1] < losses[0], losses
trainer.save_model(str(OUT / "end"))
resumed = make()
resumed.train(resume_from_checkpoint=str(OUT / "checkpoint-2"))
again = [row["loss"] for row in resumed.state.log_history if "loss" in row]
assert again == losses, (again, losses)
loaded = GPT2LMHeadModel.from_pretrained(str(OUT / "end"))  # in ZeRO 3 a collective
print("trainer", STAGE, losses, sum(p.numel() for p in loaded.parameters()))
