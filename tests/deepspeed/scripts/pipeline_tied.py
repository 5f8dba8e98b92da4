"""A pipeline as Megatron-LM and gpt-neox write it: the head is the embedding's transpose and a mask
goes from layer to layer. ZeRO 1, clipped, recomputed; half of the run follows a checkpoint."""

import os

import torch
from small import Attention, Embedding, logits, next_token_loss, sentences

if os.environ.get("PEER") == "deepspeed":
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
else:
    import glm_core.deepspeed as deepspeed
    from glm_core.deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from glm_core.deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

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
folder = os.path.join(os.environ["CHECKPOINTS"], "pipeline_tied")


class Model(PipelineModule):
    def __init__(self):
        layers = [
            TiedLayerSpec("embed", Embedding, 16, tied_weight_attr="word.weight"),
            LayerSpec(Attention, 16),
            LayerSpec(Attention, 16),
            lambda inputs: (inputs[0] * 1.5, inputs[1]),
            LayerSpec(Attention, 16),
            TiedLayerSpec(
                "embed", Embedding, 16, forward_fn=logits, tied_weight_attr="word.weight"
            ),
        ]
        super().__init__(
            layers,
            topology=PipeModelDataParallelTopology(num_pp=2, num_mp=1, num_dp=1),
            loss_fn=next_token_loss,
            partition_method="type:attention|embedding",
            activation_checkpoint_interval=1,
            activation_checkpoint_func=deepspeed.checkpointing.checkpoint,
            checkpointable_layers=["Attention"],
        )


def make(seed):
    torch.manual_seed(seed)
    model = Model()
    assert model.parts == [0, 4, 6]
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )
    return engine


def train(engine, data, steps):
    for _ in range(steps):
        loss = engine.train_batch(data_iter=data)
        losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm()))
        rates.append(engine.get_lr()[0])


losses, norms, rates = [], [], []
data = sentences(0)
engine = make(21)
train(engine, data, 7)
engine.save_checkpoint(folder, client_state={"seen": 7})
engine = make(22)
path, client = engine.load_checkpoint(folder)
assert client["seen"] == engine.global_steps == 7
train(engine, data, 7)
assert max(norms) > 2 * config["gradient_clipping"]
