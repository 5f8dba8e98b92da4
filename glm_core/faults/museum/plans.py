"""Lists the exhibits whose mistake is in the work of many processes."""

from __future__ import annotations

from glm_core.faults.museum.bugs import BUGS
from glm_core.faults.museum.exhibit import GITHUB, Exhibit, Shown

MANY: list[Exhibit] = []


def many(
    name: str,
    bug: str,
    plan: str,
    where: str,
    report: str,
    did: str,
    shown: Shown = "not said",
) -> None:
    """Adds an exhibit; the other arguments are its fields, `report` without the host."""
    entry = Exhibit(
        name=name,
        part="plan",
        fault=bug,
        plant=BUGS[bug],
        plan=plan,
        where=where,
        report=GITHUB + report,
        did=did,
        shown=shown,
    )
    MANY.append(entry)


many(
    "averaged-twice",
    "mean_over_ranks",
    "dp=2",
    "every gradient",
    "deepspeedai/DeepSpeed/pull/5555",
    "gradients were divided by too many ranks; their norm was four times too small",
    "norm",
)
many(
    "fsdp-averages-a-sum",
    "zero_averages",
    "dp=2,zero=1",
    "every gradient",
    "meta-pytorch/torchtune/pull/2172",
    "FSDP took the mean over ranks of gradients that the number of tokens had divided already",
)
many(
    "tokens-of-the-rank",
    "mean_per_rank",
    "dp=2",
    "loss",
    "NVIDIA/Megatron-LM/issues/7452",
    "a loss was divided by the rank's own number of tokens",
)
many(
    "rows-of-the-wrong-rank",
    "same_rows",
    "dp=2",
    "loss",
    "vllm-project/speculators/pull/427",
    "ranks of several nodes read the same rows: the local rank chose them",
)
many(
    "gradient-dropped-from-a-message",
    "last_gradient_not_summed",
    "dp=2",
    "gradient of *",
    "pytorch/pytorch/issues/69031",
    "parameters that the last pass did not use were never summed over ranks",
)
many(
    "gradients-never-summed",
    "gradients_not_summed",
    "dp=2",
    "every gradient",
    "deepspeedai/DeepSpeed/pull/855",
    "under a pipeline with ZeRO the function that sums gradients was not called",
)
many(
    "sums-in-bfloat16",
    "rounded_sums",
    "dp=2",
    "every gradient",
    "pytorch/pytorch/issues/106395",
    "gradients were reduced in bfloat16; training on 384 devices became unstable",
    "loss",
)
many(
    "clipped-by-a-shard",
    "norm_of_a_part",
    "dp=2,zero=2",
    "gradient norm",
    "areal-project/AReaL/issues/312",
    "each rank clipped by the norm of its own shard",
)
many(
    "clipped-by-a-stage",
    "norm_of_a_part",
    "pp=2,micro_batches=2",
    "gradient norm",
    "pytorch/torchtitan/issues/596",
    "each pipeline stage clipped by its own norm",
)
many(
    "norm-counts-copies",
    "copies_count_twice",
    "tp=2",
    "gradient norm",
    "mindspore-ai/hyper-parallel/issues/526",
    "parameters that all ranks hold were counted once per rank in the norm",
    "norm",
)
many(
    "shard-not-updated",
    "shard_not_updated",
    "dp=2,zero=1",
    "*weight*",
    "pytorch/pytorch/issues/149205",
    "an optimizer held other tensors than those the sharded model trained with",
)
many(
    "stale-parameters-gathered",
    "stale_parameters",
    "dp=2,zero=3",
    "loss",
    "NVIDIA/Megatron-LM/issues/950",
    "a layer ran before its parameters were gathered, with those of the step before",
    "loss",
)
many(
    "bias-of-every-rank",
    "bias_per_rank",
    "tp=2",
    "loss",
    "huggingface/text-generation-inference/issues/1036",
    "the bias of a row-parallel product was added on every rank",
)
many(
    "gate-and-up-cut-together",
    "halves_cut_together",
    "tp=2",
    "loss",
    "xLLM-AI/xllm/pull/1616",
    "GLM-4's fused gate and up projections were cut as one matrix",
)
many(
    "softmax-of-own-rows",
    "own_logsumexp",
    "tp=2",
    "loss",
    "bigscience-workshop/Megatron-DeepSpeed/issues/394",
    "asks whether the loss, 1 % off, normalises over the rank's part of the vocabulary",
    "loss",
)
many(
    "norm-gradients-not-summed",
    "norms_not_summed",
    "tp=2,sp=true",
    "gradient of *",
    "EleutherAI/gpt-neox/pull/1257",
    "norms' gradients were not summed under sequence parallelism; the loss stopped falling",
    "loss",
)
many(
    "tied-ends-apart",
    "ends_apart",
    "pp=2,micro_batches=2",
    "gradient of embedding",
    "uw-syfi/piper/issues/13",
    "tied embeddings on two stages each kept their own gradient",
)
