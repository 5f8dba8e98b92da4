"""A tied pipeline of uniform stages in bfloat16 with float32 sums; ZeRO 1."""

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
    "gradient_accumulation_steps": 3,
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
    "gradient_clipping": 0.5,
    "zero_optimization": {"stage": 1},
}
torch.manual_seed(23)
layers = [
    TiedLayerSpec("embed", Embedding, 16, tied_weight_attr=["word.weight"]),
    *(LayerSpec(Attention, 16) for _ in range(2)),
    TiedLayerSpec("embed", Embedding, 16, forward_fn=logits, tied_weight_attr=["word.weight"]),
]
model = PipelineModule(layers, num_stages=2, loss_fn=next_token_loss, partition_method="uniform")
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
losses, norms, rates = [], [], []
data = sentences(0)
for _ in range(12):
    losses.append(engine.train_batch(data).item())
    norms.append(float(engine.get_global_grad_norm()))
    rates.extend(engine.get_lr())
