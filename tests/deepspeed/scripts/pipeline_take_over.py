"""Continues pipeline_tied.py from the checkpoint that the other package wrote."""

import os

import torch
from small import Attention, Embedding, logits, next_token_loss, sentences

if os.environ.get("PEER") == "deepspeed":
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
else:
    import glm_core.deepspeed as deepspeed
    from glm_core.deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

config = {
    "train_micro_batch_size_per_gpu": 3,
    "gradient_accumulation_steps": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": 20, "warmup_max_lr": 1e-2, "warmup_num_steps": 4},
    },
    "gradient_clipping": 0.3,
    "zero_optimization": {"stage": 1},
}
torch.manual_seed(25)
layers = [
    TiedLayerSpec("embed", Embedding, 16, tied_weight_attr="word.weight"),
    LayerSpec(Attention, 16),
    LayerSpec(Attention, 16),
    lambda inputs: (inputs[0] * 1.5, inputs[1]),
    LayerSpec(Attention, 16),
    TiedLayerSpec("embed", Embedding, 16, forward_fn=logits, tied_weight_attr="word.weight"),
]
# cut elsewhere than the checkpoint's run was
model = PipelineModule(layers, num_stages=2, loss_fn=next_token_loss, partition_method="uniform")
assert model.parts == [0, 3, 6]
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
path, client = engine.load_checkpoint(os.path.join(os.environ["FOREIGN"], "pipeline_tied"))
assert client["seen"] == engine.global_steps == 7
losses, norms, rates = [], [], []
data = sentences(0)
for _ in range(7 * 4):
    next(data)
for _ in range(7):
    losses.append(engine.train_batch(data).item())
    norms.append(engine.get_global_grad_norm())
    rates.extend(engine.get_lr())
