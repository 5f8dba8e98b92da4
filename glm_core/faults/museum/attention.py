"""Lists the exhibits whose mistake is in the kernel of attention or of the rotation."""

from __future__ import annotations

from glm_core.faults.museum.kernels import kernel

# attention ----------------------------------------------------------------------------

kernel(
    "softmax-scale-missing",
    "attention/scale_left_out",
    "attention forward",
    "mlc-ai/mlc-llm/pull/3426",
    "a fallback path left the scores unscaled; embeddings had a cosine of 0.86",
)
kernel(
    "softmax-scale-of-the-width",
    "attention/scale_of_the_width",
    "attention forward",
    "Graylab/DL4Proteins-notebooks/issues/12",
    "scores were scaled by the whole width, not by the head's",
)
kernel(
    "grouped-heads-tiled",
    "attention/heads_interleaved",
    "attention forward",
    "onnx/onnx/pull/7274",
    "grouped heads were tiled, not repeated one by one: queries read another group's keys",
)
kernel(
    "causal-offset-with-a-cache",
    "attention/cache_ignored",
    "attention forward",
    "onnx/onnx/pull/8068",
    "the causal mask began at the first key though earlier keys were cached",
)
kernel(
    "rows-that-see-nothing-nan",
    "attention/empty_row_nan",
    "attention forward",
    "pytorch/pytorch/issues/103749",
    "queries of padding, which see no key, gave NaN",
)
kernel(
    "rows-that-see-nothing-mean",
    "attention/empty_row_mean",
    "attention forward",
    "microsoft/onnxruntime/pull/28958",
    "a query without a visible key gave the mean of all values, not zero",
)
kernel(
    "packed-samples-see-each-other",
    "attention/start_ignored",
    "attention forward",
    "alex-hh/profam/issues/495",
    "documents packed into one sequence attended to each other; accuracy was far too good",
)
kernel(
    "strides-of-queries",
    "attention/strides_of_q_ignored",
    "attention forward",
    "pytorch/pytorch/issues/112577",
    "a kernel read queries, keys and values that are not contiguous as if they were: garbage",
)
kernel(
    "strides-of-values",
    "attention/strides_of_v_ignored",
    "attention forward",
    "ROCm/pytorch/issues/3230",
    "wrong results where values alone were not contiguous",
)
kernel(
    "softmax-in-float16",
    "attention-float16-scores",
    "attention forward",
    "huggingface/transformers/pull/18057",
    "the softmax was computed in float16 and gave NaN",
)
kernel(
    "flash-gradient-of-a-batch",
    "attention/gradient_of_q_in_a_batch",
    "attention backward",
    "NVIDIA/TransformerEngine/issues/3216",
    "the gradient of q was five times too large in batches of several sequences; forward right",
    "both",
)

# rotation -----------------------------------------------------------------------------

kernel(
    "rotary-halves-for-pairs",
    "rope/never_interleaved",
    "rope forward",
    "vllm-project/vllm-ascend/issues/12765",
    "the rotation always paired halves, also for models that pair neighbours, such as GLM-OCR",
)
kernel(
    "rotary-tables-in-bfloat16",
    "rope-bfloat16-tables",
    "rope forward",
    "huggingface/transformers/pull/29285",
    "cosine and sine were rounded to bfloat16; losses were apart from the start",
    "loss",
)
kernel(
    "rotary-positions-of-one-row",
    "rope/positions_of_first_row",
    "rope forward",
    "unslothai/unsloth/pull/3803",
    "all rows of a padded batch were rotated by one row's positions",
)
kernel(
    "rotary-cache-without-offset",
    "rope/tables_by_length",
    "rope forward",
    "lucidrains/rotary-embedding-torch/issues/11",
    "tables were cached by length alone, so that another offset got the first one's",
)
