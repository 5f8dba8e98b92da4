"""Lists the exhibits whose mistake is in an op's kernel; those of attention are in `attention`."""

from __future__ import annotations

from glm_core.config import Dtype
from glm_core.faults.museum.exhibit import GITHUB, Exhibit, Shown

KERNELS: list[Exhibit] = []


def kernel(
    name: str,
    fault: str,
    where: str,
    report: str,
    did: str,
    shown: Shown = "not said",
    dtype: Dtype = "float32",
) -> None:
    """Adds an exhibit; the other arguments are its fields, `report` without the host."""
    url = GITHUB + report
    entry = Exhibit(
        name=name,
        part="kernel",
        fault=fault,
        where=where,
        report=url,
        did=did,
        shown=shown,
        dtype=dtype,
    )
    KERNELS.append(entry)


# products -----------------------------------------------------------------------------

kernel(
    "tf32-by-default",
    "linear/tf32",
    "linear forward",
    "pytorch/pytorch/issues/67384",
    "float32 products ran in TF32 unless somebody switched it off",
    "neither",
)
kernel(
    "bfloat16-accumulator",
    "linear-bfloat16-accumulator",
    "linear forward",
    "pytorch/pytorch/pull/188998",
    "generated kernels accumulated bfloat16 products in bfloat16",
    dtype="bfloat16",
)
kernel(
    "split-k-in-bfloat16",
    "linear/narrow_sum",
    "linear forward",
    "modular/modular/issues/7165",
    "partial sums were kept in bfloat16; sums that cancel were off by up to 40 %",
    dtype="bfloat16",
)
kernel(
    "inner-tail-lost",
    "linear/inner_tail_lost",
    "linear forward",
    "NVIDIA/cutlass/issues/3536",
    "elements past the last whole tile of the inner dimension were left out",
)
kernel(
    "offsets-in-32-bits",
    "linear/offsets_in_32_bits",
    "linear forward",
    "fla-org/flash-linear-attention/issues/1080",
    "offsets wrapped past 2^31 elements: wrong values, no error, training went on",
)
kernel(
    "denormals-flushed",
    "linear/subnormals_flushed",
    "linear backward",
    "pytorch/pytorch/issues/182952",
    "float16 products of the backward flushed subnormal numbers to zero; training diverged",
    "loss",
    "float16",
)
kernel(
    "weight-gradient-overwritten",
    "linear/weight_gradient_overwritten",
    "linear backward",
    "karpathy/llm.c/pull/408",
    "a backward (there a layer norm's) did not accumulate gradients; planted in a product",
)
kernel(
    "bfloat16-cut-off",
    "linear/truncated",
    "linear forward",
    "mmastrac/diffgemma/pull/18",
    "bfloat16 results were cut off, not rounded: 0.28 % of each row's norm was lost",
    dtype="bfloat16",
)

# norms --------------------------------------------------------------------------------

kernel(
    "rms-eps-outside-the-root",
    "rms_norm/eps_outside_root",
    "rms_norm forward",
    "EleutherAI/gpt-neox/pull/1342",
    "epsilon was added to the root mean square, not under the root",
)
kernel(
    "rms-eps-hard-coded",
    "rms_norm/eps_of_llama",
    "rms_norm forward",
    "NVIDIA/cutlass/pull/1112",
    "epsilon was 1e-6 whatever the model had",
)
kernel(
    "rms-squares-in-half",
    "rms_norm/narrow_sum",
    "rms_norm forward",
    "jingyaogong/minimind/issues/301",
    "the mean square was computed before the widening to float32",
    dtype="bfloat16",
)
kernel(
    "rms-weight-gradient-in-bfloat16",
    "rms_norm/low_weight_gradient",
    "rms_norm backward",
    "linkedin/Liger-Kernel/pull/950",
    "the gradient of the weight was summed in bfloat16",
    dtype="bfloat16",
)
kernel(
    "layer-norm-weight-gradient-in-bfloat16",
    "layer-norm-native-bfloat16",
    "layer_norm backward",
    "karpathy/llm.c/pull/476",
    "the gradient of the weight was added up in bfloat16 by atomics",
    dtype="bfloat16",
)
kernel(
    "layer-norm-statistics-in-bfloat16",
    "layer_norm/low_statistics",
    "layer_norm backward",
    "pytorch/pytorch/pull/140259",
    "the backward rounded mean and deviation to the working dtype",
    dtype="bfloat16",
)

# activations, embedding, loss ---------------------------------------------------------

kernel(
    "gelu-erf-for-tanh",
    "gelu/exact",
    "gelu forward",
    "NVIDIA-NeMo/Megatron-Bridge/pull/4661",
    "the exact GELU ran on weights trained with the tanh form",
)
kernel(
    "swiglu-halves-exchanged",
    "swiglu/gate_second",
    "swiglu forward",
    "ooples/AiDotNet.Tensors/pull/46",
    "the activation was applied to the other half",
)
kernel(
    "embedding-gradient-in-bfloat16",
    "embedding/narrow_gradient_sum",
    "embedding backward",
    "tenstorrent/tt-metal/pull/53386",
    "the gradient of a token that occurs often stopped growing: it was summed in bfloat16",
    dtype="bfloat16",
)
kernel(
    "embedding-gradient-overwritten",
    "embedding/last_gradient_wins",
    "embedding backward",
    "ooples/AiDotNet.Tensors/pull/894",
    "the backward of a gather did not add what repeated indices received",
)
kernel(
    "ignore-index-unused",
    "linear_cross_entropy/weights_ignored",
    "linear_cross_entropy forward",
    "lucidrains/DALLE-pytorch/issues/57",
    "ignore_index was defined but not used: padding counted in the loss",
)
kernel(
    "mean-over-padding",
    "linear_cross_entropy/mean",
    "linear_cross_entropy forward",
    "facebookresearch/fairseq2/pull/1455",
    "the mean over tokens took no account of padding and mask",
)
kernel(
    "label-smoothing-of-ignored-tokens",
    "linear_cross_entropy/ignored_tokens_smoothed",
    "linear_cross_entropy forward",
    "pytorch/pytorch/issues/73205",
    "the smoothed part of the loss counted ignored tokens",
)
kernel(
    "labels-shifted-twice",
    "linear_cross_entropy/labels_shifted",
    "linear_cross_entropy forward",
    "huggingface/transformers/issues/47394",
    "labels were shifted by the model and again by the loss",
)
kernel(
    "token-weights-lost-in-backward",
    "linear_cross_entropy/weight_gradient_unweighted",
    "linear_cross_entropy backward",
    "linkedin/Liger-Kernel/pull/1298",
    "the head's gradient had one weight for all tokens; the loss was right",
    "neither",
)

# optimizer ----------------------------------------------------------------------------

kernel(
    "adam-eps-inside-the-root",
    "adamw/eps_inside_root",
    "adamw",
    "FluxML/Flux.jl/pull/448",
    "epsilon was added under the root, as if it were 1e-4",
)
kernel(
    "adam-eps-uncorrected",
    "adamw/eps_uncorrected",
    "adamw",
    "tensorflow/tensorflow/issues/9047",
    "the bias correction scaled epsilon too",
)
kernel(
    "adam-decay-coupled",
    "adamw/decay_coupled",
    "adamw",
    "keras-team/keras/issues/19051",
    "AdamW had become Adam with an L2 penalty",
)
kernel(
    "adam-without-bias-correction",
    "adamw/uncorrected",
    "adamw",
    "ml-explore/mlx/pull/1640",
    "AdamW had no bias correction; a small model trained otherwise than in PyTorch",
)
kernel(
    "adam-step-off-by-one",
    "adamw-step-off-by-one",
    "adamw",
    "NVIDIA/Megatron-LM/pull/5976",
    "a step that only made the state was counted: bias correction began at step 2",
)
kernel(
    "adam-step-of-every-tensor",
    "adamw/step_per_tensor",
    "adamw",
    "mlx-node/mlx-node/pull/11",
    "the step count grew with every tensor, so that bias correction ended early",
)
kernel(
    "adam-strides-of-parameters",
    "adamw/strides_of_params_ignored",
    "adamw",
    "pytorch/pytorch/issues/118115",
    "addcdiv was wrong on tensors that are not contiguous: optimizers updated other elements",
)
