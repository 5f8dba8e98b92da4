"""A pipeline of two stages and two replicas with different data: tied, ZeRO 1, clipped, SGD with
momentum, with a checkpoint on the way."""

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
    "gradient_clipping": 0.3,
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
}
torch.manual_seed(24)
layers = [
    TiedLayerSpec("embed", Embedding, 16, tied_weight_attr="word.weight"),
    *(LayerSpec(Attention, 16) for _ in range(3)),
    TiedLayerSpec("embed", Embedding, 16, forward_fn=logits, tied_weight_attr="word.weight"),
]
model = PipelineModule(layers, num_stages=2, loss_fn=next_token_loss)
client = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
engine, *_ = deepspeed.initialize(model=model, optimizer=client, config=config)
losses, norms, rates = [], [], []
data = sentences(model.mpu().get_data_parallel_rank())
for step in range(12):
    if step == 6:
        engine.save_checkpoint(os.path.join(os.environ["CHECKPOINTS"], "pipeline_replicas"))
    losses.append(engine.train_batch(data).item())
    norms.append(float(engine.get_global_grad_norm()))
    rates.extend(engine.get_lr())
