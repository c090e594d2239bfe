"""The keys of DeepSpeed 0.19.8's JSON and the rule of each: pass it, compare it with the config, or refuse it.

`python -m sdit.config.deepspeed_keys` prints the tables of docs/deepspeed-json.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any


@dataclass(frozen=True)
class Legal:
    """The legal values of a passed key: a flag, one of `choices`, or a number from `least` to `most`."""

    choices: tuple[Any, ...] = ()
    least: float | None = None
    most: float | None = None
    whole: bool = True
    even: bool = False

    @property
    def text(self) -> str:
        if self.least is None:
            return ", ".join(json.dumps(choice) for choice in self.choices)
        kind = "an even number" if self.even else "a whole number" if self.whole else "a number"
        number = f"{kind} from {self.least:,}"
        number += "" if self.most is None else f" to {self.most:,}"
        return ", ".join([number, *(json.dumps(choice) for choice in self.choices)])

    def allows(self, value: Any) -> bool:
        """Return True if a value is legal. true and 1 are different values."""
        if is_one_of(value, self.choices):
            return True
        if self.least is None or isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        if self.even and value % 2:
            return False
        return self.least <= value <= (sys.float_info.max if self.most is None else self.most)


@dataclass(frozen=True)
class Passed:
    """DeepSpeed receives the value. "auto" selects DeepSpeed's default."""

    legal: Legal
    note: str = ""


@dataclass(frozen=True)
class Shared:
    """The value must equal that of the run's config, or be "auto"."""

    setting: str


@dataclass(frozen=True)
class Ours:
    """A key of the run's config decides. The JSON may hold `harmless` values, which DeepSpeed does not receive.

    `block`: the keys of an object that describes a feature (empty: not listed here), or None for a plain value.
    """

    setting: str
    harmless: tuple[Any, ...] = ()
    block: str | None = None


@dataclass(frozen=True)
class Refused:
    """sdit does not support it. The JSON may hold `harmless` values, which DeepSpeed does not receive."""

    reason: str
    harmless: tuple[Any, ...] = ()
    block: str | None = None


@dataclass(frozen=True)
class Renamed:
    """An old name of the key `name`. `values` translates old values. None means that the key is omitted."""

    name: str
    values: Mapping[bool, Any] | None = field(default=None, hash=False)


@dataclass(frozen=True)
class Block:
    """An object whose keys have rules. A value in `absent` counts as a missing object."""

    keys: Mapping[str, Rule]
    absent: tuple[Any, ...] = (None, "auto")


Rule = Passed | Shared | Ours | Refused | Renamed | Block

ANY = ""  # the `block` of an object whose keys are not listed here


def is_one_of(value: Any, choices: tuple[Any, ...]) -> bool:
    """Return True if a JSON value equals one of `choices`. true and 1 differ, 1 and 1.0 do not."""
    return any(isinstance(value, bool) == isinstance(choice, bool) and value == choice for choice in choices)


def _rules(rule: type[Ours | Refused], text: str, /, **harmless: Any) -> dict[str, Rule]:
    """Return one rule per keyword. The value is its harmless value, or a tuple of them."""
    return {key: rule(text, value if isinstance(value, tuple) else (value,)) for key, value in harmless.items()}


_ours, _refused = partial(_rules, Ours), partial(_rules, Refused)
FLAG = Legal((True, False))
MOST_NUMBERS = 2_000_000_000  # of a bucket; DeepSpeed allocates the whole bucket, which is 8 GB in fp32
STAGE_3 = "it has an effect only at ZeRO stage 3"
NVME = 'it has an effect only with device "nvme", and the legal devices are "none" and "cpu"'
NO_TENSORS = "sdit has no tensor parallelism; parallel.expert shards the experts"
REMOVED = "DeepSpeed 0.19.8 no longer has it"
QUANTIZED = "quantized weights and gradients change the numbers"
SCHEDULE = "optimizer.warmup_images, optimizer.decay, optimizer.final_ratio"

OFFLOAD_OPTIMIZER: dict[str, Rule] = {
    "device": Passed(Legal(("none", "cpu")), '"cpu": the optimizer state and its step are on the host; stage 1 or 2'),
    "pin_memory": Passed(FLAG, "page-locked host memory"),
    **_refused(NVME, nvme_path=None, buffer_count=4, pipeline_read=False, pipeline_write=False, fast_init=False),
    **_refused(STAGE_3, ratio=1, super_offload=False, cpuadam_cores_perc=0.8),
}
OFFLOAD_PARAM: dict[str, Rule] = {
    "device": Refused(STAGE_3, ("none",)),
    "pin_memory": Refused(STAGE_3, (True, False)),
    **_refused(STAGE_3, nvme_path=None, buffer_count=5, buffer_size=100_000_000, max_in_cpu=1_000_000_000),
}
ZERO: dict[str, Rule] = {
    "stage": Passed(Legal((0, 1, 2)), '"auto": 1, as in configs/deepspeed/zero1.json'),
    "reduce_bucket_size": Passed(Legal(least=1, most=MOST_NUMBERS), "numbers per reduction"),
    "allgather_bucket_size": Passed(Legal(least=2, most=MOST_NUMBERS, even=True), "numbers per all-gather"),
    "overlap_comm": Passed(Legal((True, False, None)), "reduce gradients during the backward pass; a second bucket"),
    "contiguous_gradients": Passed(FLAG, "at stage 2 only true"),
    "use_multi_rank_bucket_allreduce": Passed(FLAG, "one all-reduce for a bucket of several ranks"),
    "offload_optimizer": Block(OFFLOAD_OPTIMIZER),
    "cpu_offload": Renamed("offload_optimizer", {True: {"device": "cpu"}, False: None}),
    **_refused("it would mix the gradients of different experts", reduce_scatter=True),
    **_refused("it moves parameters between ranks, and training would be wrong", round_robin_gradients=False),
    **_refused("checkpoints and sdit plan need unpadded parameters", parameter_alignment=False),
    **_refused("sdit computes the gradient norm itself", compute_grad_norm=True),
    **_refused("an expert that no sample uses has no gradient", ignore_unused_parameters=True),
    **_refused("DeepSpeed 0.19.8 ignores it", allgather_partitions=True, legacy_stage1=False),
    **_refused("sdit has its own checkpoints", load_from_fp32_weights=True, elastic_checkpoint=False),
    **_refused("set offload_optimizer.pin_memory", cpu_offload_use_pin_memory=(None, False)),
    **_refused(QUANTIZED, zero_quantized_weights=False, zero_quantized_gradients=False),
    **_refused(QUANTIZED, zero_quantized_nontrainable_weights=False),
    "offload_param": Block(OFFLOAD_PARAM),
    **_refused(STAGE_3, cpu_offload_param=(None, False), sub_group_size=1_000_000_000, zero_hpz_partition_size=(0, 1)),
    **_refused(STAGE_3, stage3_prefetch_bucket_size=50_000_000, prefetch_bucket_size=50_000_000),
    **_refused(STAGE_3, stage3_param_persistence_threshold=100_000, param_persistence_threshold=100_000),
    **_refused(STAGE_3, stage3_model_persistence_threshold=sys.maxsize, model_persistence_threshold=sys.maxsize),
    **_refused(STAGE_3, stage3_max_live_parameters=1_000_000_000, max_live_parameters=1_000_000_000),
    **_refused(STAGE_3, stage3_max_reuse_distance=1_000_000_000, max_reuse_distance=1_000_000_000),
    **_refused(STAGE_3, stage3_gather_16bit_weights_on_model_save=False, gather_16bit_weights_on_model_save=False),
    **_refused(STAGE_3, stage3_gather_fp16_weights_on_model_save=False),
    **_refused(STAGE_3, stage3_module_granularity_threshold=0, module_granularity_threshold=0),
    **_refused(STAGE_3, stage3_use_all_reduce_for_fetch_params=False, use_all_reduce_for_fetch_params=False),
    **_refused(STAGE_3, stage3_allgather_sequential=False, allgather_sequential=False),
    **_refused(STAGE_3, memory_efficient_linear=True, override_module_apply=True, pipeline_loading_checkpoint=False),
    **_refused(STAGE_3, log_trace_cache_warnings=False, enable_sanity_checks=False),
    **_refused(STAGE_3, save_muon_momentum_buffer_in_memory=False),
    "leaf_module": Refused(STAGE_3, block="classes names name_suffixes"),
    "zenflow": Refused(
        'it delays gradients; use offload_optimizer with "device": "cpu"',
        block="topk_ratio select_strategy select_interval update_interval overlap_step offload auto_ratio "
        "full_warm_up_rounds pt_reserved_cores_perc steps_per_epoch",
    ),
    **{key: Refused(REMOVED) for key in ("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param")},
}
OPTIMIZER: dict[str, Rule] = {
    "type": Shared("optimizer.kind"),
    "params": Block(
        {
            "lr": Shared("optimizer.learning_rate"),
            "betas": Shared("optimizer.beta1, optimizer.beta2"),
            "eps": Shared("optimizer.epsilon"),
            "weight_decay": Shared("optimizer.weight_decay"),
            "max_grad_norm": Shared("optimizer.clip_grad_norm"),
            **_ours("optimizer.kind", torch_adam=True, adam_w_mode=True, bias_correction=True, amsgrad=False),
            **_ours("optimizer.kind", momentum=0, dampening=0, nesterov=False, maximize=False),
        }
    ),
    **_refused("the optimizer is torch's", legacy_fusion=False),
}
SCHEDULE_KEYS = (
    "warmup_max_lr warmup_num_steps total_num_steps warmup_min_ratio cos_min_ratio cycle_min_lr cycle_max_lr "
    "decay_lr_rate cycle_first_step_size cycle_second_step_size cycle_first_stair_count cycle_second_stair_count "
    "decay_step_size cycle_momentum cycle_min_mom cycle_max_mom decay_mom_rate lr_range_test_min_lr "
    "lr_range_test_step_size lr_range_test_step_rate lr_range_test_staircase"
)
SCHEDULER: dict[str, Rule] = {
    "type": Ours(SCHEDULE, (None, "WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest")),
    "params": Block(
        {
            **_ours(SCHEDULE, warmup_min_lr=0, warmup_type="linear", last_batch_iteration=-1),
            **{key: Ours(SCHEDULE) for key in SCHEDULE_KEYS.split()},
        }
    ),
}
BF16: dict[str, Rule] = {
    "enabled": Shared("train.precision"),
    **_refused("sdit checks the gradients of all ranks itself", check_grad_overflow=(True, False)),
    **_refused("sdit reduces gradients at the end of a step", immediate_grad_update=False),
    **_refused("masters, moments and gradients are fp32", bf16_master_weights_and_grads=False),
    **_refused("masters, moments and gradients are fp32", bf16_optimizer_states=False),
}
ACTIVATION_CHECKPOINTING = _ours(
    "parallel.activation_checkpointing", partition_activations=False, cpu_checkpointing=False,
    contiguous_memory_optimization=False, number_checkpoints=None, synchronize_checkpoint_boundary=False, profile=False,
)  # fmt: skip
COMPILE = _ours(
    "parallel.compile", deepcompile=False, autoep_non_moe=False, free_activation=False,
    free_activation_threshold=10 * 1024 * 1024, offload_activation=False, offload_activation_pin_memory=True,
    offload_opt_states=False, double_buffer=True, symmetric_memory=False, debug_log=False, offload_parameters=False,
    sync_before_reduce=False, sync_after_reduce=False, sync_before_allgather=False, sync_after_allgather=False,
    keep_int_input_tensors=True, keep_all_input_tensors=False, passes=None,
)  # fmt: skip
PIPELINE = _refused(
    "sdit has no pipeline parallelism", stages=(0, 1), partition="best", seed_layers=False,
    activation_checkpoint_interval=0, pipe_partitioned=True, grad_partitioned=True,
)  # fmt: skip
AIO = _refused(
    NVME, block_size=1_048_576, queue_depth=8, intra_op_parallelism=1, single_submit=False, overlap_events=True,
    use_gds=False,
)  # fmt: skip
KEYS: dict[str, Rule] = {
    # Shared with the config of the run.
    "train_batch_size": Shared("train.global_batch"),
    "train_micro_batch_size_per_gpu": Shared("train.micro_batch"),
    "gradient_accumulation_steps": Shared("train.global_batch / (train.micro_batch x ranks)"),
    "gradient_clipping": Shared("optimizer.clip_grad_norm"),
    "bf16": Block(BF16),
    "bfloat16": Renamed("bf16"),
    "optimizer": Block(OPTIMIZER),
    "scheduler": Block(SCHEDULER),
    "communication_data_type": Shared("train.precision"),
    "data_types": Block(
        {
            "grad_accum_dtype": Shared("train.precision"),
            **_ours("train.precision", param_dtype=None, buffer_dtype=None, keep_in_fp32_modules="auto"),
        }
    ),
    # ZeRO, and what DeepSpeed prints.
    "zero_optimization": Block(ZERO, (None, False, "auto")),
    "steps_per_print": Passed(Legal((None,), least=1), 'steps between two lines of DeepSpeed; needs log_level "info"'),
    "log_level": Passed(Legal(("debug", "info", "warning", "error", "critical")), "of DeepSpeed's own lines"),
    "wall_clock_breakdown": Passed(FLAG, "print the times of forward, backward and step; waits for the device"),
    "disable_python_gc": Passed(FLAG, "no cyclic garbage collection while training"),
    "timers": Block({"throughput": Block({"enabled": Passed(FLAG), "synchronized": Passed(FLAG)})}),
    "flops_profiler": Block(
        {
            "enabled": Passed(FLAG, "print the FLOPs of one step of rank 0"),
            "profile_step": Passed(Legal(least=1)),
            "module_depth": Passed(Legal(least=-1)),
            "top_modules": Passed(Legal(least=1)),
            "detailed": Passed(FLAG),
            "recompute_fwd_factor": Passed(Legal(least=0.0, most=1.0, whole=False)),
            **_refused("the profile goes to the log", output_file=(None, "")),
        }
    ),
    # Decided by the config of the run.
    "fp16": Ours(
        "train.precision (fp32 or bf16)",
        block="enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
        "min_loss_scale fp16_master_weights_and_grads",
    ),
    "amp": Ours("train.precision (fp32 or bf16)", block=ANY),
    "torch_autocast": Ours("train.precision (fp32 or bf16)", block="enabled dtype lower_precision_safe_modules"),
    "activation_checkpointing": Block(ACTIVATION_CHECKPOINTING),
    "compile": Block(COMPILE),
    "checkpoint": Block(
        {
            **_ours("checkpoint.*", tag_validation=("Ignore", "Warn", "Fail", "IGNORE", "WARN", "FAIL")),
            **_ours("checkpoint.*", load_universal=False, use_node_local_storage=False, checkpoint_serialization=True),
            "parallel_write": Block(_ours("checkpoint.*", pipeline_stage=False)),
            "writer": Ours(
                "checkpoint.*",
                block="type decoupled io_buffer_size io_buffer_double show_statistics data_parallel io_multiplier",
            ),
        }
    ),
    "datastates_ckpt": Ours("checkpoint.asynchronous", block=ANY),
    "nebula": Ours("checkpoint.asynchronous", block=ANY),
    "tensorboard": Ours("observe.tensorboard: true", block="enabled output_path job_name"),
    "wandb": Ours("observe.wandb: online", block="enabled group team project"),
    "csv_monitor": Ours(
        "train.log_every_steps (RUN/metrics.jsonl holds the numbers)", block="enabled output_path job_name"
    ),
    "comet": Ours(
        "observe.wandb or observe.tensorboard",
        block="enabled samples_log_interval project workspace api_key experiment_name experiment_key online mode",
    ),
    "comms_logger": Ours(
        "observe.metrics_port (the exporter counts the bytes)", block="enabled prof_all prof_ops verbose debug"
    ),
    "data_efficiency": Ours("data.*", block=ANY),
    "curriculum_learning": Ours("data.*", block=ANY),
    **_ours("data.*", dataloader_drop_last=False),
    "expert_parallel": Ours("parallel.expert", block=ANY),
    "moe": Ours("model.experts.* and parallel.expert", block=ANY),
    "elasticity": Ours("supervise.elastic", block=ANY),
    # Refused.
    **_refused("it changes the arithmetic of the gradients", prescale_gradients=False, gradient_predivide_factor=1),
    **_refused("it changes the arithmetic of the gradients", gradient_allreduce_op="mean", fp32_allreduce=False),
    **_refused("it changes the arithmetic of the gradients", allreduce_always_fp32=False),
    "pipeline": Block(PIPELINE),
    "tensor_parallel": Block(
        {
            **_refused(NO_TENSORS, autotp_size=(0, 1), tp_overlap_comm=False, keep_module_on_host=False),
            **_refused(NO_TENSORS, vocab_parallel_lm_head=(None, False), vocab_parallel_ce_backend="torch"),
            **_refused(NO_TENSORS, injection_policy_tuple=None, partition_config=None, preset_model=None),
            **_refused(NO_TENSORS, replace_with_kernel_inject=False, kernel_inject=False, dtype=()),
            "tensor_parallel": Refused(NO_TENSORS, block="tp_size tp_grain_size mpu tp_group"),
            "tp": Refused(NO_TENSORS, block="tp_size tp_grain_size mpu tp_group"),
        }
    ),
    **_refused("sdit has no sequence parallelism", sequence_parallel_size=1),
    **_refused("sdit has no sequence parallelism", seq_parallel_communication_data_type=(None, "fp32")),
    **_refused("the ranks of an expert group are consecutive", use_data_before_expert_parallelism=False),
    **_refused("sdit counts micro-steps with DeepSpeed", managed_gradient_accumulation=True),
    **_refused("sdit creates the optimizer", zero_allow_untested_optimizer=True, zero_force_ds_cpu_optimizer=False),
    **_refused("DeepSpeed 0.19.8 ignores it", disable_allgather=False),
    **_refused("images have no vocabulary", vocabulary_size=None),
    **_refused('log_level "info" prints the configuration', dump_state=False),
    **_refused("RUN/metrics.jsonl holds the memory of the ranks", memory_breakdown=False),
    **_refused("set zero_optimization.allgather_bucket_size", allgather_size=()),
    **_refused("the dense gradients of the label table are reduced", sparse_gradients=False),
    **_refused(REMOVED, graph_harvesting=False),
    "aio": Block(AIO),
    "autotuning": Refused("sdit plan estimates memory and traffic of a layout", block=ANY),
    "hybrid_engine": Refused(
        "it is for language models that generate text while training",
        block="enabled max_out_tokens inference_tp_size release_inference_cache pin_parameters "
        "tp_gather_partition_size enable_cuda_graph",
    ),
    "weight_quantization": Refused("quantized weights change the numbers", block=ANY),
    "compression_training": Refused("compressed weights change the numbers", block=ANY),
    "quantize_training": Refused("quantized weights change the numbers", block=ANY),
    **{key: Refused(REMOVED, block=ANY) for key in ("eigenvalue", "sparse_attention", "progressive_layer_drop")},
}


def rules(keys: Mapping[str, Rule] = KEYS, prefix: str = "") -> Iterator[tuple[str, Rule]]:
    """Yield (dotted key, rule) of each key that is not an object with rules, in order."""
    for key, rule in keys.items():
        if isinstance(rule, Block):
            yield from rules(rule.keys, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", rule


def as_markdown() -> str:
    """Return the tables of docs/deepspeed-json.md."""
    tables: dict[type, tuple[str, list[str]]] = {
        Passed: ("### DeepSpeed receives it\n\n| key | legal | |\n|---|---|---|", []),
        Shared: ("### The same as in the config\n\n| key | key of the config |\n|---|---|", []),
        Ours: (
            "### Set in the config instead\n\n| key | key of the config | harmless in the JSON |\n|---|---|---|",
            [],
        ),
        Refused: ("### Refused\n\n| key | reason | harmless in the JSON |\n|---|---|---|", []),
        Renamed: ("### Old names\n\n| old | new |\n|---|---|", []),
    }
    for key, rule in rules():
        tables[type(rule)][1].append("| " + " | ".join([f"`{key}`", *_cells(rule)]) + " |")
    return "\n\n".join("\n".join([head, *lines]) for head, lines in tables.values()) + "\n"


def _cells(rule: Rule) -> list[str]:
    if isinstance(rule, Passed):
        return [rule.legal.text, rule.note]
    if isinstance(rule, Shared):
        return [f"`{rule.setting}`"]
    if isinstance(rule, Renamed):
        return [f"`{rule.name}`"]
    assert not isinstance(rule, Block)
    why = f"`{rule.setting}`" if isinstance(rule, Ours) else rule.reason
    return [why, harmless_text(rule)]


def harmless_text(rule: Ours | Refused) -> str:
    """Return the values that the JSON may hold under a key that sdit does not pass on, as JSON."""
    if rule.block is not None:
        return "{}" if rule.block and "enabled" not in rule.block.split() else '{"enabled": false}'
    return ", ".join([*(json.dumps(value) for value in rule.harmless), '"auto"'])


if __name__ == "__main__":
    print(as_markdown(), end="")
