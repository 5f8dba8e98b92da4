"""SGD with momentum clips every step; the script reads whole gradients and masters; ZeRO 2."""

import os

import torch
from small import Classifier, batches

if os.environ.get("PEER") == "deepspeed":
    import deepspeed
else:
    import glm_core.deepspeed as deepspeed

config = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.05,
}
torch.manual_seed(8)
model = Classifier()
engine, *_ = deepspeed.initialize(
    model=model,
    model_parameters=model.parameters(),
    config=config,
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
)
losses, norms, rates = [], [], []
for batch in batches(12):
    loss = engine(**batch)["loss"]
    engine.backward(loss)
    grad = deepspeed.utils.safe_get_full_grad(engine.module.head.weight)
    losses.append(grad.norm().item())
    engine.step()
    losses.append(loss.item())
    norms.append(float(engine.get_global_grad_norm()))
    rates.append(engine.get_lr()[0])
    master = deepspeed.utils.safe_get_full_fp32_param(engine.module.head.weight)
    losses.append(master.norm().item())
