"""Lists the configuration keys that change nothing we compute. A key is honoured (a `Field` of its
layout, or one of rope_scaling), must have one value (`required`), or is neutral and stands here;
any other key is refused by name.

Neutral means: the same logits at inference. Dropout is among them, since we train without it."""

from __future__ import annotations

from typing import Any

_TOKENS = """bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id mask_token_id
gmask_token_id cls_token_id decoder_start_token_id decoder_bos_token_id decoder_eos_token_id
tokenizer_class tokenizer_type prefix bad_words_ids suppress_tokens begin_suppress_tokens
forced_bos_token_id forced_eos_token_id"""
_GENERATION = """max_length min_length do_sample early_stopping num_beams num_beam_groups top_k
temperature top_p typical_p repetition_penalty length_penalty diversity_penalty
no_repeat_ngram_size
encoder_no_repeat_ngram_size num_return_sequences exponential_decay_length_penalty
remove_invalid_values use_cache return_dict return_dict_in_generate output_scores output_attentions
output_hidden_states"""
_PROVENANCE = """torch_dtype dtype transformers_version auto_map name_or_path unsloth_version
unsloth_fixed transformers.js_config task_specific_params id2label label2id num_labels problem_type
finetuning_task classifier_dropout torchscript use_bfloat16 tf_legacy_loss is_decoder
chunk_size_feed_forward base_model_tp_plan base_model_pp_plan attn_implementation
attn_implementation_autoset"""
_DROPOUT = """attention_dropout hidden_dropout dropout embedding_dropout drop_path
attention_dropout_prob embedding_dropout_prob output_dropout_prob hidden_dropout_prob"""
COMMON = frozenset(f"{_TOKENS} {_GENERATION} {_PROVENANCE} {_DROPOUT}".split())
"""keys of every layout: token ids, generation's defaults, where a file comes from, and dropout"""
_SHARDS = """model_parallel_size skip_init use_gpu_initialization make_vocab_size_divisible_by
checkpoint_activations checkpoint_num_layers checkpoint_skip_layers fp16 bf16"""
# of training, and sizes that follow from others
_EXPERTS = """initializer_range output_router_logits router_aux_loss_coef aux_loss_alpha seq_aux
pretraining_tp ep_size qk_head_dim head_dim"""
_PER_LAYOUT = {
    "glm": "initializer_range",
    "glm4": "initializer_range",
    "glm4_moe": _EXPERTS,
    "glm4_moe_fused": _EXPERTS,
    "glm4_moe_lite": _EXPERTS,
    "glm4_moe_lite_fused": _EXPERTS,
    # three ways to compute the same, and sizes that other keys give too
    "chatglm2": """bias_dropout_fusion attention_softmax_in_fp32 apply_query_key_layer_scaling
    vocab_size num_hidden_layers use_flash_attn""",
    # recomputation in training, and heads that a language model does not use
    "glm-block": """initializer_range checkpoint_activations checkpoint_num_layers parallel_output
    output_predict pool_token spell_length spell_func max_memory_length
    use_scaled_init_for_output_weights""",
    "glm-130b": _SHARDS,
    "sat-chatglm-6b": _SHARDS,
}
PER_LAYOUT = {layout: frozenset(text.split()) for layout, text in _PER_LAYOUT.items()}
"""keys of one layout only"""
QUANTIZATION = frozenset(["quantization_bit", "quantization_activation_bits"])
"""read with the weights, whose shapes say the same"""
DISABLED: dict[str, Any] = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "cross_attention_hidden_size": None,
    "pruned_heads": {},
    "quantization_config": None,
    "quantization_embeddings": False,
    "pre_seq_len": (None, 0),
    "prefix_projection": False,
    "fp32_residual_connection": False,
    "sparse_attention": False,
    "interleaved_qkv": False,
    "rotary_percent": 0.5,  # CodeGeeX2's, a ChatGLM2
    "sandwich_ln": False,
    "num_multi_query_heads": 0,
    "no_glu": False,
}
"""keys of features that no layout has, with the values that change nothing"""


def neutral(layout: str, key: str) -> bool:
    """Whether a key of this layout's config changes nothing we compute. Keys that begin with `_`
    are transformers' own notes."""
    own = PER_LAYOUT.get(layout, frozenset())
    return key.startswith("_") or key in COMMON | QUANTIZATION | own
