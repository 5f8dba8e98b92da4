"""Lists every key of a DeepSpeed config (0.19.8) and what becomes of it here."""

from __future__ import annotations

from typing import Any, NamedTuple


class Key(NamedTuple):
    """What becomes of one config key."""

    state: str
    """`supported`, `no effect` (mentioned once on stderr), `error`, `host` (asks for main memory:
    without effect on the CPU), or `section` (of further
    keys)"""
    reason: str = ""
    """no effect: why none is needed; error: what the key would change, and what to do instead"""
    harmless: tuple[Any, ...] = (None, False)
    """error: values that ask for nothing and so are accepted; for every key so are None, False, an
    empty section and one with `"enabled": false`"""
    empty_is_on: bool = False
    """error: an empty section asks for its defaults, and is an error too"""


OK = Key("supported")
SECTION = Key("section")


def _no_effect(reason: str) -> Key:
    return Key("no effect", reason)


def _error(reason: str, *harmless: Any) -> Key:
    return Key("error", reason, (None, False, *harmless))


_BUFFERS = "it sizes DeepSpeed's own buffers; results are the same"
_LOGS = "it decides what DeepSpeed logs; glm_core has its own measurements"
_MONITOR = "it is not supported; use csv_monitor or tensorboard, or log from the script"
_HOST = Key("host", "would keep this on NVMe; use cpu, or remove it")
_QUANT = "would round what is communicated (ZeRO++), changing the loss; remove it"
_REMOVED = "was removed from DeepSpeed itself (0.19); remove it"
_AUTOTP = "would split layers over ranks by name; use glm_core.distributed's plan (tp=)"
_MOE = "would place experts on ranks; use glm_core.distributed's plan (ep=)"
_COMPILE = "would compile the step with DeepCompile; call torch.compile(model) before initialize"
_ZENFLOW = "would update only the largest gradients at once, changing the loss; remove it"
_DATA = "would reorder or shorten samples, changing the loss; do so in your data loader"
_TUNE = "would search for batch sizes; set them"
_WQ = "would quantise the weights; remove it"

TOP: dict[str, Key] = {
    "train_batch_size": OK,
    "train_micro_batch_size_per_gpu": OK,
    "gradient_accumulation_steps": OK,
    "managed_gradient_accumulation": OK,
    "optimizer": SECTION,
    "scheduler": SECTION,
    "fp16": SECTION,
    "bf16": SECTION,
    "bfloat16": SECTION,
    "zero_optimization": SECTION,
    "gradient_clipping": OK,
    "prescale_gradients": OK,
    "gradient_predivide_factor": OK,
    "gradient_allreduce_op": OK,
    "communication_data_type": OK,
    "seq_parallel_communication_data_type": _no_effect("this engine has no sequence parallelism"),
    "zero_allow_untested_optimizer": _no_effect("any element-wise torch optimizer is accepted"),
    "zero_force_ds_cpu_optimizer": _no_effect("any optimizer updates in main memory"),
    "steps_per_print": OK,
    "wall_clock_breakdown": OK,
    "memory_breakdown": _no_effect(_LOGS),
    "dump_state": _no_effect(_LOGS),
    "log_level": _no_effect(_LOGS),
    "disable_python_gc": _no_effect("Python's collector is left alone"),
    "disable_allgather": _no_effect("the backend chooses the collective; results are the same"),
    "dataloader_drop_last": OK,
    "torch_autocast": SECTION,
    "data_types": SECTION,
    "activation_checkpointing": SECTION,
    "pipeline": SECTION,
    "checkpoint": SECTION,
    "comms_logger": SECTION,
    "flops_profiler": SECTION,
    "timers": SECTION,
    "tensorboard": SECTION,
    "wandb": SECTION,
    "csv_monitor": SECTION,
    "comet": SECTION,
    "aio": SECTION,
    "data_parallel_group": _error("would name another group of ranks; pass mpu to initialize"),
    "sequence_parallel_size": _error(
        "would split sequences over ranks (Ulysses); use glm_core.distributed's plan", 1
    ),
    "tensor_parallel": _error(_AUTOTP, {}),
    "expert_parallel": _error(_MOE, {}),
    "use_data_before_expert_parallelism": _error(_MOE),
    "hybrid_engine": SECTION,
    "autotuning": SECTION,
    "data_efficiency": SECTION,
    "compile": SECTION,
    "weight_quantization": _error(_WQ, {}),
    "datastates_ckpt": _error("would write checkpoints through DataStates; remove it", {}),
    "vocabulary_size": _no_effect("DeepSpeed does not use it for training either"),
    "check_overflow": _no_effect("DeepSpeed does not read it either"),
    "global_rank": _no_effect("the rank is the process group's"),
    **dict.fromkeys(
        (
            "nebula",
            "compression_training",
            "amp",
            "quantize_training",
            "sparse_gradients",
            "eigenvalue",
            "sparse_attention",
            "elasticity",
            "graph_harvesting",
            "curriculum_learning",
            "progressive_layer_drop",
        ),
        Key("error", _REMOVED, ()),
    ),
}


def _switch(reason: str, fields: str) -> dict[str, Key]:
    """Returns a section that asks for something only where it is `enabled`."""
    idle = _all_without_effect("its section cannot be enabled here", fields)
    return {"enabled": _error(reason), **idle}


def _all_without_effect(reason: str, fields: str) -> dict[str, Key]:
    return dict.fromkeys(fields.split(), _no_effect(reason))


SECTIONS: dict[str, dict[str, Key]] = {
    "optimizer": {
        "type": OK,
        "params": OK,
        "legacy_fusion": _no_effect("one optimizer implementation for all"),
    },
    "scheduler": {"type": OK, "params": OK},
    "fp16": {
        **dict.fromkeys(
            (
                "enabled",
                "auto_cast",
                "loss_scale",
                "initial_scale_power",
                "loss_scale_window",
                "hysteresis",
                "consecutive_hysteresis",
                "min_loss_scale",
            ),
            OK,
        ),
        "fp16_master_weights_and_grads": _error(
            "would keep masters in float16, changing the loss; masters here are float32: remove it"
        ),
    },
    "bf16": {
        "enabled": OK,
        "check_grad_overflow": OK,
        "immediate_grad_update": _no_effect("gradients are summed in float32 either way"),
        "bf16_master_weights_and_grads": _error(
            "would keep masters in bfloat16, changing the loss; masters here are float32: remove it"
        ),
        "bf16_optimizer_states": _error(
            "would keep moments in bfloat16, changing the loss; they are float32 here: remove it"
        ),
    },
    "zero_optimization": {
        "stage": OK,
        "reduce_bucket_size": OK,
        "reduce_scatter": _no_effect("gradients of stages 1 and 2 are always reduce-scattered"),
        "overlap_comm": _no_effect("torch decides what overlaps; results are the same"),
        "ignore_unused_parameters": OK,
        "enable_sanity_checks": OK,
        "compute_grad_norm": _no_effect("the norm is always computed"),
        "load_from_fp32_weights": OK,
        "param_persistence_threshold": OK,
        "stage3_param_persistence_threshold": OK,
        "elastic_checkpoint": _no_effect("checkpoints resume on any number of ranks"),
        "gather_16bit_weights_on_model_save": OK,
        "stage3_gather_16bit_weights_on_model_save": OK,
        "stage3_gather_fp16_weights_on_model_save": OK,
        **_all_without_effect(
            _BUFFERS,
            "contiguous_gradients use_multi_rank_bucket_allreduce allgather_partitions "
            "allgather_bucket_size sub_group_size prefetch_bucket_size max_live_parameters "
            "max_reuse_distance model_persistence_threshold "
            "stage3_prefetch_bucket_size stage3_max_live_parameters stage3_max_reuse_distance "
            "stage3_model_persistence_threshold "
            "module_granularity_threshold stage3_module_granularity_threshold "
            "use_all_reduce_for_fetch_params stage3_use_all_reduce_for_fetch_params "
            "allgather_sequential stage3_allgather_sequential round_robin_gradients "
            "parameter_alignment memory_efficient_linear override_module_apply "
            "pipeline_loading_checkpoint log_trace_cache_warnings "
            "save_muon_momentum_buffer_in_memory",
        ),
        "cpu_offload_use_pin_memory": OK,
        "leaf_module": OK,
        "offload_param": _HOST,
        "offload_optimizer": _HOST,
        "cpu_offload": _HOST,
        "cpu_offload_param": _HOST,
        "zenflow": _error(_ZENFLOW)._replace(empty_is_on=True),
        "legacy_stage1": _error("was removed from DeepSpeed itself; remove it"),
        "zero_hpz_partition_size": _error(
            "would keep a second copy per node; use a replicate x shard mesh in the plan", 1
        ),
        "zero_quantized_weights": _error(_QUANT),
        "zero_quantized_nontrainable_weights": _error(_QUANT),
        "zero_quantized_gradients": _error(_QUANT),
        **dict.fromkeys(
            ("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"),
            Key("error", _REMOVED, (-1,)),
        ),
    },
    "torch_autocast": {
        "enabled": _error("would autocast each op; use bf16.enabled, or torch.autocast yourself"),
        "dtype": _no_effect("torch_autocast is not enabled"),
        "lower_precision_safe_modules": _no_effect("torch_autocast is not enabled"),
    },
    "data_types": {
        "grad_accum_dtype": OK,
        "param_dtype": OK,
        "buffer_dtype": OK,
        "keep_in_fp32_modules": _error(
            "would leave some modules in float32; use float32 or bf16 as a whole", "auto", []
        ),
    },
    "activation_checkpointing": {
        "partition_activations": OK,
        "cpu_checkpointing": OK,
        "contiguous_memory_optimization": _no_effect(_BUFFERS),
        "number_checkpoints": _no_effect(_BUFFERS),
        "synchronize_checkpoint_boundary": _no_effect(_LOGS),
        "profile": _no_effect(_LOGS),
    },
    "pipeline": {
        "stages": _no_effect("PipelineModule's num_stages decides, in DeepSpeed too")._replace(
            harmless=(None, False, "auto")
        ),
        "partition": _no_effect("PipelineModule's partition_method decides, in DeepSpeed too"),
        "seed_layers": _no_effect("PipelineModule's seed_layers decides, in DeepSpeed too"),
        "activation_checkpoint_interval": OK,
        "pipe_partitioned": _no_effect("activations are sent whole; results are the same"),
        "grad_partitioned": _no_effect("gradients are sent whole; results are the same"),
        "use_reentrant": _no_effect("torch's non-reentrant recomputation is used"),
    },
    "checkpoint": {
        "tag_validation": OK,
        "load_universal": OK,
        "use_node_local_storage": _error(
            "every rank reads all files; save to a folder that all nodes share"
        ),
        "parallel_write": _no_effect("every rank writes its own file"),
        "writer": _no_effect("torch.save writes"),
    },
    "comms_logger": _all_without_effect(_LOGS, "enabled prof_all prof_ops verbose debug"),
    "flops_profiler": {
        **dict.fromkeys(("enabled", "profile_step", "module_depth", "detailed", "output_file"), OK),
        "top_modules": _no_effect("all modules down to module_depth are listed"),
        "recompute_fwd_factor": _no_effect("only the forward is counted"),
    },
    "timers": _all_without_effect(_LOGS, "throughput"),
    "tensorboard": dict.fromkeys(("enabled", "output_path", "job_name"), OK),
    "wandb": _all_without_effect(_MONITOR, "enabled group team project"),
    "csv_monitor": dict.fromkeys(("enabled", "output_path", "job_name"), OK),
    "comet": _all_without_effect(
        _MONITOR,
        "enabled samples_log_interval project workspace api_key experiment_name "
        "experiment_key online mode",
    ),
    "aio": _all_without_effect(
        "nothing is swapped to NVMe",
        "block_size queue_depth intra_op_parallelism thread_count "
        "single_submit overlap_events use_gds",
    ),
    "hybrid_engine": _switch(
        "would generate with inference kernels; call generate on engine.module",
        "max_out_tokens inference_tp_size release_inference_cache pin_parameters "
        "tp_gather_partition_size enable_cuda_graph",
    ),
    "autotuning": _switch(
        _TUNE,
        "start_step end_step metric_path arg_mappings metric model_info results_dir "
        "exps_dir overwrite fast start_profile_step end_profile_step tuner_type "
        "tuner_early_stopping tuner_num_trials model_info_path mp_size max_train_batch_size "
        "min_train_batch_size max_train_micro_batch_size_per_gpu "
        "min_train_micro_batch_size_per_gpu num_tuning_micro_batch_sizes",
    ),
    "data_efficiency": _switch(_DATA, "seed data_sampling data_routing"),
    "compile": {
        "deepcompile": _error(_COMPILE),
        **_all_without_effect(
            "it configures DeepCompile, which is not used here",
            "autoep_non_moe free_activation free_activation_threshold "
            "offload_activation offload_activation_pin_memory offload_opt_states double_buffer "
            "symmetric_memory debug_log offload_parameters sync_before_reduce sync_after_reduce "
            "sync_before_allgather sync_after_allgather keep_int_input_tensors "
            "keep_all_input_tensors passes",
        ),
    },
}
SECTIONS["bfloat16"] = SECTIONS["bf16"]
