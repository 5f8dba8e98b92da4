"""Continues pipeline_replicas.py from the checkpoint that the other package wrote, with layers cut
elsewhere."""

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
torch.manual_seed(27)
layers = [
    TiedLayerSpec("embed", Embedding, 16, tied_weight_attr="word.weight"),
    *(LayerSpec(Attention, 16) for _ in range(3)),
    TiedLayerSpec("embed", Embedding, 16, forward_fn=logits, tied_weight_attr="word.weight"),
]
model = PipelineModule(layers, num_stages=2, loss_fn=next_token_loss, partition_method="type:embed")
client = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
engine, *_ = deepspeed.initialize(model=model, optimizer=client, config=config)
assert model.parts == [0, 4, 5]
engine.load_checkpoint(os.path.join(os.environ["FOREIGN"], "pipeline_replicas"))
assert engine.global_steps == 6
losses, norms, rates = [], [], []
data = sentences(model.mpu().get_data_parallel_rank())
for _ in range(6 * 4):
    next(data)
for _ in range(6):
    losses.append(engine.train_batch(data).item())
    norms.append(engine.get_global_grad_norm())
    rates.extend(engine.get_lr())
