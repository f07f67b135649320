"""The fields of TOML files and where TorchTitan 0.3 has them: the one table, read in both directions."""

__all__ = ["COUNTERPARTS", "WITHOUT"]


def _same(section, place, names):
    return {f"{section}.{name}": f"{place}.{name}" for name in names.split()}


# Field of a TOML file: field of Trainer.Config. Whole sections of this package are one entry each. What is not a field
# but a choice of class there (model.flavor, [activation_checkpoint]) is in job_config.py.
COUNTERPARTS = {
    "job.dump_folder": "dump_folder",
    "job.print_config": "debug.print_config",
    "job.save_config_file": "debug.save_config_file",
    **_same(
        "profiling",
        "profiler",
        "enable_profiling save_traces_folder profile_freq profiler_active profiler_warmup enable_memory_snapshot "
        "save_memory_snapshot_folder",
    ),
    **_same(
        "metrics",
        "metrics",
        "log_freq enable_tensorboard disable_color_printing save_tb_folder save_for_all_ranks enable_wandb",
    ),
    "model.hf_assets_path": "hf_assets_path",
    "model.converters": "converters",
    **_same("optimizer", "optimizer", "name lr beta1 beta2 eps weight_decay implementation"),
    **_same("lr_scheduler", "lr_scheduler", "warmup_steps total_steps decay_ratio decay_type min_lr_factor"),
    **_same("training", "dataloader", "dataset dataset_path"),
    **_same("training.dataloader", "dataloader", "num_workers persistent_workers pin_memory prefetch_factor"),
    **_same(
        "training",
        "training",
        "local_batch_size global_batch_size seq_len max_norm steps enable_cpu_offload dtype mixed_precision_param "
        "mixed_precision_reduce gc_freq gc_debug",
    ),
    **_same(
        "parallelism",
        "parallelism",
        "data_parallel_replicate_degree data_parallel_shard_degree fsdp_reshard_after_forward tensor_parallel_degree "
        "pipeline_parallel_degree module_fqns_per_model_part pipeline_parallel_first_stage_less_layers "
        "pipeline_parallel_last_stage_less_layers pipeline_parallel_layers_per_stage pipeline_parallel_schedule "
        "pipeline_parallel_schedule_csv pipeline_parallel_microbatch_size context_parallel_degree "
        "context_parallel_load_balancer expert_parallel_degree",
    ),
    "parallelism.enable_async_tensor_parallel": "compile.enable_async_tensor_parallel",
    **_same(
        "checkpoint",
        "checkpoint",
        "enable folder interval initial_load_path initial_load_model_only initial_load_in_hf "
        "initial_load_in_hf_quantized last_save_model_only last_save_in_hf export_dtype async_mode keep_latest_k "
        "load_step exclude_from_loading enable_first_step_checkpoint create_seed_checkpoint load_only",
    ),
    **_same("compile", "compile", "enable components backend"),
    "quantize.linear.float8": "quantize.linear.float8",
    "quantize.linear.mx": "quantize.linear.mx",
    **_same(
        "comm",
        "comm",
        "init_timeout_seconds train_timeout_seconds trace_buf_size save_traces_folder save_traces_file_prefix mode",
    ),
    **_same("validation", "validator", "enable freq steps"),
    **_same("validation", "validator.dataloader", "dataset dataset_path local_batch_size seq_len"),
    **_same(
        "validation.dataloader", "validator.dataloader", "num_workers persistent_workers pin_memory prefetch_factor"
    ),
    **_same("debug", "debug", "seed deterministic deterministic_warn_only moe_force_load_balance"),
    "gdn2": "gdn2",
    "data": "data",
    "task": "task",
}

# Fields of TOML files that TorchTitan 0.3 has not, with their defaults, which say no more than leaving them out.
WITHOUT = {
    "model.tokenizer_path": None,
    "model.print_after_conversion": False,
    "optimizer.early_step_in_backward": False,
    "parallelism.disable_loss_parallel": False,
    "parallelism.pipeline_parallel_expert_parallel_overlap": True,
    "parallelism.context_parallel_rotate_method": "allgather",
    "parallelism.expert_tensor_parallel_degree": 1,
    "parallelism.expert_parallel_comm_backend": "standard",
    "checkpoint.enable_ft_dataloader_checkpoints": True,
    "activation_checkpoint.early_stop": False,
    "quantize.grouped_mm.float8.fqns": [],
    "quantize.grouped_mm.mx.recipe_name": "mxfp8",
    "quantize.grouped_mm.mx.fqns": [],
    "memory_estimation.enable": False,
    "memory_estimation.disable_fake_mode": False,
    "fault_tolerance.enable": False,
    "fault_tolerance.process_group": "gloo",
    "fault_tolerance.process_group_timeout_ms": 10000,
    "fault_tolerance.replica_id": 0,
    "fault_tolerance.group_size": 0,
    "fault_tolerance.min_replica_size": 1,
    "fault_tolerance.semi_sync_method": None,
    "experimental.custom_import": "",
    "experimental.custom_args_module": "",
}
