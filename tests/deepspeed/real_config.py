"""Runs in real DeepSpeed's interpreter and reports its config's fields, its loss scale over a
pattern of overflows, its partitions, and its schedules step by step."""

import importlib
import json
from importlib import metadata

import torch
from deepspeed.runtime import constants, lr_schedules
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.utils import partition_balanced, partition_uniform
from recipes import PATTERN, SCHEDULES, WEIGHTS, follow

MODELS = {
    "fp16": "deepspeed.runtime.precision_config.DeepSpeedFP16Config",
    "bf16": "deepspeed.runtime.precision_config.DeepSpeedBF16Config",
    "zero_optimization": "deepspeed.runtime.zero.config.DeepSpeedZeroConfig",
    "comms_logger": "deepspeed.comm.config.CommsLoggerConfig",
    "tensorboard": "deepspeed.monitor.config.TensorBoardConfig",
    "wandb": "deepspeed.monitor.config.WandbConfig",
    "csv_monitor": "deepspeed.monitor.config.CSVConfig",
    "comet": "deepspeed.monitor.config.CometConfig",
    "compile": "deepspeed.compile.config.CompileConfig",
    "hybrid_engine": "deepspeed.runtime.config.HybridEngineConfig",
}
TOP = (
    "TRAIN_BATCH_SIZE",
    "TRAIN_MICRO_BATCH_SIZE_PER_GPU",
    "GRADIENT_ACCUMULATION_STEPS",
    "OPTIMIZER",
    "SCHEDULER",
    "FP16",
    "BFLOAT16",
    "BFLOAT16_OLD",
    "GRADIENT_CLIPPING",
    "PRESCALE_GRADIENTS",
    "GRADIENT_PREDIVIDE_FACTOR",
    "GRADIENT_ALLREDUCE_OP",
    "COMMUNICATION_DATA_TYPE",
    "SEQ_PARALLEL_COMMUNICATION_DATA_TYPE",
    "MANAGED_GRADIENT_ACCUMULATION",
    "STEPS_PER_PRINT",
    "WALL_CLOCK_BREAKDOWN",
    "MEMORY_BREAKDOWN",
    "DUMP_STATE",
    "DISABLE_ALLGATHER",
    "DISABLE_PYTHON_GC",
    "LOG_LEVEL",
    "DATALOADER_DROP_LAST",
    "TORCH_AUTOCAST",
    "DATA_TYPES",
    "CHECKPOINT",
    "ZERO_ALLOW_UNTESTED_OPTIMIZER",
    "ZERO_FORCE_DS_CPU_OPTIMIZER",
    "VOCABULARY_SIZE",
    "USE_DATA_BEFORE_EXPERT_PARALLEL",
    "DATA_PARALLEL_GROUP",
    "CHECK_OVERFLOW",
)


def fields(path):
    """Returns a pydantic model's fields and their aliases."""
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name).model_fields
    return sorted({*found, *(f.alias for f in found.values() if f.alias)})


parts = [
    [list(map(int, found)) for found in (partition_uniform(len(w), n), partition_balanced(w, n))]
    for w, n in WEIGHTS
]
scales = {}
for window, hysteresis, consecutive in ((2, 1, False), (3, 2, False), (2, 3, True)):
    scaler = DynamicLossScaler(2.0**16, window, 1, hysteresis, consecutive)
    scaler.update_scale.__globals__["dist"].get_rank = lambda: 1  # it prints on rank 0
    seen = []
    for overflow in PATTERN:
        scaler.update_scale(overflow)
        seen.append(scaler.cur_scale)
    scales[f"{window} {hysteresis} {int(consecutive)}"] = seen
courses = []
for name, params in SCHEDULES:
    for start in (0, 3):
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": r} for r in (1e-2, 2e-2)]
        optimizer = torch.optim.AdamW(groups)
        kind = getattr(lr_schedules, name)
        courses.append(follow(lambda o, k=kind, p=params: k(o, **p), optimizer, start))
print(
    "REPORT"
    + json.dumps(
        {
            "versions": {p: metadata.version(p) for p in ("deepspeed", "torch")},
            "top": [getattr(constants, n) for n in TOP],
            "sections": {name: fields(path) for name, path in MODELS.items()},
            "scales": scales,
            "courses": courses,
            "parts": parts,
        }
    )
)
