"""The DeepSpeed JSON: each key is passed, compared with the config, or refused before a run starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdit import cli
from sdit.config import Config, merge_deepspeed
from sdit.config.deepspeed_json import uses_bf16_optimizer
from sdit.errors import ConfigError, ExitCode
from sdit.topology import BatchPlan
from tests.cases.commands import fork
from tests.distributed.harness import ROOT, case, metrics_of, tensors_of, train_together

TINY = ROOT / "tests" / "distributed" / "tiny.yaml"
BIG = 1_000_000_000
Check = Callable[..., SimpleNamespace]


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Return a function that reads a JSON as `submit --dry-run` does: exit status and lines of errors."""

    def run(content: Any, *overrides: str) -> SimpleNamespace:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(content))
        words = ["submit", "--config", TINY, "--ds_config", path, "--run-dir", tmp_path / "run", "--dry-run"]
        capsys.readouterr()
        status = cli.run([str(word) for word in (*words, *overrides)])
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return SimpleNamespace(status=status, errors=err.splitlines())

    return run


def assert_refused(result: SimpleNamespace, *words: str) -> None:
    assert result.status == ExitCode.CONFIG, result
    assert len(result.errors) == 1 and "ds.json: " in result.errors[0], result.errors
    for word in words:
        assert word in result.errors[0], result.errors[0]
    assert "legal: " in result.errors[0] or "unknown key" in result.errors[0]


def zero(stage: int = 1, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


ENABLED = {"enabled": True}
CHANGES_NUMBERS = [  # JSON, words of the line
    ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "torch_autocast: ", "train.precision"),
    ({"torch_autocast": ENABLED}, "torch_autocast: ", "train.precision"),
    ({"fp16": ENABLED}, "fp16: ", "train.precision"),
    ({"fp16": {"loss_scale": 0}}, "fp16: ", "train.precision"),
    ({"amp": {"enabled": True, "opt_level": "O1"}}, "amp: ", "train.precision"),
    ({"bf16": ENABLED}, "bf16.enabled: true", 'train.precision: "fp32"'),
    ({"bf16": {"bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads: true", "fp32"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, 'data_types.grad_accum_dtype: "bf16"', "train.precision"),
    ({"data_types": {"param_dtype": "bf16"}}, 'data_types.param_dtype: "bf16"', "train.precision"),
    ({"communication_data_type": "fp16"}, 'communication_data_type: "fp16"', "train.precision"),
    ({"seq_parallel_communication_data_type": "bf16"}, "seq_parallel_communication_data_type", "sequence"),
    ({"prescale_gradients": True}, "prescale_gradients: true", "false"),
    ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor: 2.0", "legal: 1"),
    ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op: "sum"', '"mean"'),
    ({"fp32_allreduce": True}, "fp32_allreduce: true", "false"),
    (zero(2, round_robin_gradients=True), "round_robin_gradients: true", "false"),
    (zero(1, reduce_scatter=False), "reduce_scatter: false", "true"),
    (zero(2, zero_quantized_gradients=True), "zero_quantized_gradients: true", "false"),
    (zero(2, zenflow={"topk_ratio": 0.1}), "zero_optimization.zenflow: ", "offload_optimizer"),
    ({"use_data_before_expert_parallelism": True}, "use_data_before_expert_parallelism: true", "false"),
    ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation: false", "true"),
    ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer: true", "false"),
    ({"weight_quantization": {"quantized_initialization": {}}}, "weight_quantization: ", "quantized"),
    ({"compression_training": {"weight_quantization": {}}}, "compression_training: ", "compressed"),
]


@pytest.mark.parametrize(("content", "key", "word"), CHANGES_NUMBERS)
def test_what_changes_the_numbers_is_refused(check: Check, content: Any, key: str, word: str) -> None:
    """D1: A key that makes a run compute other numbers than its config says is refused."""
    assert_refused(check(content), key, word)


@pytest.mark.parametrize("enabled", [False, "auto"])
@pytest.mark.parametrize("key", ["torch_autocast", "fp16", "amp", "tensorboard", "wandb", "elasticity", "nebula"])
def test_a_feature_that_is_off_is_accepted(check: Check, key: str, enabled: Any) -> None:
    """D1: The block of a refused feature is legal while it says that the feature is off."""
    for content in ({"enabled": enabled}, {}, None):
        assert check({key: content}).status == ExitCode.DONE


def test_old_name_of_bf16(check: Check) -> None:
    """D2: "bfloat16" means bf16."""
    on = {"bfloat16": ENABLED}
    assert_refused(check(on), "bf16.enabled: true", 'train.precision: "fp32"', "false")
    assert check(on, "train.precision=bf16").status == ExitCode.DONE
    assert_refused(check({"bfloat16": {"enabled": False}}, "train.precision=bf16"), "bf16.enabled: false")
    assert_refused(check({"bfloat16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}), "bfloat16", "both")


def test_old_names_of_offload(check: Check) -> None:
    """D2: "cpu_offload" means offload_optimizer; other old names are answered with the new one."""
    assert check(zero(2, cpu_offload=True)).status == ExitCode.DONE
    assert_refused(check(zero(0, cpu_offload=True)), 'offload_optimizer.device: "cpu"', "stage 1 or 2")
    assert_refused(check(zero(2, cpu_offload=True, offload_optimizer={"device": "cpu"})), "cpu_offload", "both")
    assert_refused(check(zero(2, cpu_offload="yes")), 'cpu_offload: "yes"', "true, false")
    assert_refused(check(zero(2, cpu_offload_use_pin_memory=True)), "offload_optimizer.pin_memory")
    assert_refused(check({"allgather_size": 5}), "zero_optimization.allgather_bucket_size")


NOT_PASSED = [
    (zero(1, reduce_bucket_sise=5), "reduce_bucket_sise: unknown key; did you mean zero_optimization.reduce_bucket_size"),
    (zero(1, Stage=2), "zero_optimization.Stage: unknown key; did you mean zero_optimization.stage?"),
    (zero(2, offload_optimizer={"devise": "cpu"}), "did you mean zero_optimization.offload_optimizer.device?"),
    ({"bf16": {"enable": True}}, "bf16.enable: unknown key; did you mean bf16.enabled?"),
    ({"fp16": {"enabled": False, "los_scale": 0}}, "fp16.los_scale: unknown key; did you mean fp16.loss_scale?"),
    ({"activation_checkpointing": {"partitioned_activations": True}}, "partition_activations?"),
    ({"elasticity": ENABLED}, "supervise.elastic"),
    ({"sparse_gradients": True}, "sparse_gradients: true"),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size: 2"),
    ({"pipeline": {"stages": 2}}, "pipeline.stages: 2"),
    ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size: 2"),
    ({"progressive_layer_drop": ENABLED}, "progressive_layer_drop"),
    ({"curriculum_learning": ENABLED}, "data.*"),
    ({"hybrid_engine": ENABLED}, "hybrid_engine"),
    ({"compile": {"deepcompile": True}}, "parallel.compile"),
    ({"activation_checkpointing": {"partition_activations": True}}, "parallel.activation_checkpointing"),
    ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal: true"),
    (zero(1, mics_shard_size=2), "mics_shard_size: 2"),
    (zero(2, offload_optimizer={"device": "nvme", "nvme_path": "/nvme"}), 'offload_optimizer.device: "nvme"'),
    (zero(2, offload_param={"device": "cpu"}), 'offload_param.device: "cpu"'),
    (zero(2, contiguous_gradients=False), "contiguous_gradients: false"),
    (zero(0, offload_optimizer={"device": "cpu"}), 'offload_optimizer.device: "cpu" has no effect at stage 0'),
    (zero(1, allgather_bucket_size=1001), "allgather_bucket_size: 1001"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "line"), NOT_PASSED)
def test_what_deepspeed_would_not_take_is_refused(check: Check, content: Any, line: str) -> None:
    """D3: A key that makes DeepSpeed raise an error in every rank is refused before a rank starts."""
    assert_refused(check(content), line)


@pytest.mark.parametrize(
    ("key", "setting"),
    [
        ("tensorboard", "observe.tensorboard"),
        ("wandb", "observe.wandb"),
        ("comet", "observe.wandb"),
        ("csv_monitor", "metrics.jsonl"),
        ("comms_logger", "observe.metrics_port"),
    ],
)
def test_a_monitor_is_answered_with_the_own_key(check: Check, key: str, setting: str) -> None:
    """D4: A monitor block names the key of the config that does the same."""
    for block in (ENABLED, {"enabled": True, "output_path": "logs"}, {"job_name": "mine"}, True, {"enabled": "yes"}):
        assert_refused(check({key: block}), f"{key}: ", setting)


NO_EFFECT = [
    ({"train_bath_size": 32}, "train_bath_size: unknown key; did you mean train_batch_size?"),
    ({"zero_optimisation": {"stage": 1}}, "did you mean zero_optimization?"),
    ({"reduce_bucket_size": 5}, "reduce_bucket_size: unknown key; did you mean zero_optimization.reduce_bucket_size?"),
    ({"stage": 2}, "stage: unknown key; did you mean zero_optimization.stage?"),
    ({"lr": 1e-3}, "lr: unknown key; did you mean optimizer.params.lr?"),
    ({"xyzzy": 1}, "xyzzy: unknown key; docs/deepspeed-json.md"),
    ({"": 1}, '"": unknown key'),
    ({"moe": {"num_experts": 8}}, "model.experts"),
    ({"expert_parallel": {"enabled": True, "autoep_size": 2}}, "parallel.expert"),
    (zero(2, zero_hpz_partition_size=8), "zero_hpz_partition_size: 8"),
    (zero(2, zero_quantized_weights=True), "zero_quantized_weights: true"),
    (zero(2, stage3_max_live_parameters=5), "stage3_max_live_parameters: 5"),
    (zero(2, stage3_gather_fp16_weights_on_model_save=True), "stage3_gather_fp16_weights_on_model_save: true"),
    ({"vocabulary_size": 1024}, "vocabulary_size: 1024"),
    ({"dump_state": True}, "dump_state: true"),
    ({"memory_breakdown": True}, "memory_breakdown: true"),
    ({"disable_allgather": True}, "disable_allgather: true"),
    ({"dataloader_drop_last": True}, "dataloader_drop_last: true"),
    ({"aio": {"block_size": 5}}, "aio.block_size: 5"),
    ({"autotuning": ENABLED}, "sdit plan"),
]


@pytest.mark.parametrize(("content", "line"), NO_EFFECT)
def test_what_would_have_no_effect_is_refused(check: Check, content: Any, line: str) -> None:
    """D5: A key that nothing reads, or that acts elsewhere only, is refused with the nearest key or the own one."""
    assert_refused(check(content), line)


def test_comments_are_left_out(check: Check) -> None:
    """D5: A key that begins with _, // or # is a comment, on every level."""
    assert check({"_comment": "x", "//": [1], "#note": {}, "comment": "y", **zero(1, _why="x")}).status == ExitCode.DONE


ILLEGAL = [
    (zero(1, reduce_bucket_size=value), f"reduce_bucket_size: {json.dumps(value)} is not legal; legal: a whole number")
    for value in (-1, 0, 1.5, "5e8", True, None, [1], {"a": 1}, 1e10, 1e300)
] + [
    (zero(1, overlap_comm="true"), 'overlap_comm: "true" is not legal; legal: true, false'),
    (zero(1, overlap_comm=1), "overlap_comm: 1 is not legal; legal: true, false"),
    (zero(1, offload_optimizer="cpu"), 'offload_optimizer: "cpu" is not legal; legal: an object'),
    ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: true is not supported; legal: 0, 1, 2"),
    ({"zero_optimization": {"stage": "1"}}, 'zero_optimization.stage: "1" is not supported; legal: 0, 1, 2'),
    ({"zero_optimization": {"stage": 3}}, "stage: 3 is not supported; legal: 0, 1, 2 (stage 3 does not support"),
    ({"zero_optimization": {"stage": None}}, "zero_optimization.stage: null is not supported; legal: 0, 1, 2"),
    ({"zero_optimization": True}, "zero_optimization: true is not legal; legal: an object"),
    ({"zero_optimization": 3}, "zero_optimization: 3 is not legal; legal: an object"),
    ({"zero_optimization": [1]}, "zero_optimization: [1] is not legal; legal: an object"),
    ({"optimizer": "AdamW"}, 'optimizer: "AdamW" is not legal; legal: an object'),
    ({"optimizer": {"type": 5}}, "optimizer.type: 5 disagrees with optimizer.kind"),
    ({"optimizer": {"params": {"lr": "1e-3"}}}, 'optimizer.params.lr: "1e-3" disagrees with optimizer.learning_rate'),
    ({"optimizer": {"params": {"betas": 0.9}}}, "optimizer.params.betas: 0.9 disagrees with optimizer.beta1"),
    ({"optimizer": {"params": {"amsgrad": True}}}, "optimizer.params.amsgrad: true"),
    ({"bf16": True}, "bf16: true is not legal; legal: an object"),
    ({"bf16": {"enabled": "false"}}, 'bf16.enabled: "false" disagrees with train.precision'),
    ({"train_batch_size": "32"}, 'train_batch_size: "32" disagrees with train.global_batch: 32'),
    ({"train_micro_batch_size_per_gpu": True}, "train_micro_batch_size_per_gpu: true disagrees"),
    ({"gradient_clipping": 1.0}, "gradient_clipping: 1.0 disagrees with optimizer.clip_grad_norm: null"),
    ({"steps_per_print": 0}, "steps_per_print: 0 is not legal; legal: a whole number from 1"),
    ({"log_level": "loud"}, 'log_level: "loud" is not legal; legal: "debug"'),
    ({"wall_clock_breakdown": 1}, "wall_clock_breakdown: 1 is not legal; legal: true, false"),
    ({"timers": {"throughput": False}}, "timers.throughput: false is not legal; legal: an object"),
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler.params"),
    ({"scheduler": {"type": "Foo", "params": "auto"}}, 'scheduler.type: "Foo"'),
    ({"scheduler": {"params": {"warmup_num_steps": 100}}}, "optimizer.warmup_images"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "line"), ILLEGAL)
def test_illegal_values_are_refused(check: Check, content: Any, line: str) -> None:
    """D3: One line names the key, its value and what is legal."""
    assert_refused(check(content), line)


ODD = [
    None, True, False, 0, 1, -1, 0.5, 1e400, 10**50, "", "x", "AUTO", "5e8", "\ud800", "\n", [], [[1]], {}, {"": {}},
    {"enabled": 1}, {"enabled": {}}, {"_": 0},
]  # fmt: skip


def test_no_value_of_any_key_is_a_traceback() -> None:
    """D3: Any value of any key is merged, or refused in one line."""
    from sdit.config.deepspeed_keys import rules

    paths = {".".join(path.split(".")[:depth]) for path, _ in rules() for depth in (1, 2, 3, 4)}
    refusals = 0
    for path in sorted(paths):
        for value in ODD:
            content: Any = value
            for key in reversed(path.split(".")):
                content = {key: content}
            try:
                merged = merge_deepspeed(Config(), BatchPlan(256, 256, 1), content, "ds.json")
            except ConfigError as error:
                refusals += 1
                assert "\n" not in str(error) and len(str(error)) < 500, error
            else:
                json.dumps(merged, allow_nan=False)
    assert refusals > len(paths)


HUGGING_FACE = {  # the ZeRO-2 example of the Transformers manual, with everything that it allows to be "auto"
    "fp16": {
        "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "amp": {"enabled": "auto", "opt_level": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "allgather_partitions": True,
        "allgather_bucket_size": 2e8, "overlap_comm": True, "reduce_scatter": True, "reduce_bucket_size": "auto",
        "contiguous_gradients": True, "sub_group_size": 1e9, "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": "auto",
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}  # fmt: skip


def leaves(values: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        yield (*prefix, key)


@pytest.mark.parametrize("path", [(), *leaves(HUGGING_FACE)], ids=".".join)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_auto_means_what_the_config_says(check: Check, path: tuple[str, ...], precision: str) -> None:
    """D6: The JSON of Hugging Face's manuals is legal, and "auto" is legal in place of each of its values."""
    content = json.loads(json.dumps(HUGGING_FACE))
    node = content
    for key in path[:-1]:
        node = node[key]
    if path:
        node[path[-1]] = "auto"
    result = check(content, f"train.precision={precision}")
    assert result.status == ExitCode.DONE, result


@pytest.mark.parametrize(
    "scheduler",
    [
        {"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto", "total_num_steps": "auto"}},
        {"type": "WarmupCosineLR", "params": {"warmup_num_steps": "auto", "cos_min_ratio": "auto"}},
        {"type": "auto", "params": {"warmup_min_lr": 0, "warmup_type": "linear", "last_batch_iteration": -1}},
        {"type": "WarmupLR", "params": "auto"},
        "auto",
    ],
)
def test_an_automatic_scheduler_is_the_configs(check: Check, scheduler: Any) -> None:
    """D6: A scheduler whose values are all "auto" means the schedule of the config."""
    assert check({"scheduler": scheduler}).status == ExitCode.DONE


def train(verb: str, run_dir: Path, content: Any) -> subprocess.CompletedProcess[str]:
    """Run a launcher as a user does, with two steps of the tiny model."""
    path = run_dir.with_suffix(".json")
    path.write_text(json.dumps(content))
    environment = {name: value for name, value in os.environ.items() if not name.endswith(("RANK", "WORLD_SIZE"))}
    target = [str(TINY)] if verb == "plan" else ["--config", str(TINY), "--run-dir", str(run_dir)]
    command = [sys.executable, str(ROOT / "launcher" / f"{verb}.py"), *target, "--ds_config", str(path)]
    command += ["train.steps=2"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize(
    "content",
    [
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        zero(1, reduce_bucket_sise=5),
        {"tensorboard": ENABLED},
        {"moe": {"num_experts": 4}},
    ],
    ids=["D1", "D3", "D4", "D5"],
)
@pytest.mark.parametrize("verb", ["train", "plan"])
def test_a_refusal_starts_nothing(tmp_path: Path, verb: str, content: Any) -> None:
    """D3: A refused JSON ends the command with one line and 78, and leaves no run folder."""
    done = train(verb, tmp_path / "run", content)
    assert done.returncode == ExitCode.CONFIG, done
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ") and not done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_a_refusal_needs_no_torch(tmp_path: Path, verb: str) -> None:
    """D3: A JSON is refused in under a second of CPU time, before torch and DeepSpeed are imported."""
    (tmp_path / "ds.json").write_text(json.dumps({"elasticity": ENABLED}))
    script = f"""
import resource, sys
from sdit.cli.{verb} import main
target = [{str(TINY)!r}] if {verb!r} == "plan" else ["--config", {str(TINY)!r}, "--run-dir", {str(tmp_path)!r}]
code = main([*target, "--ds_config", {str(tmp_path / "ds.json")!r}])
used = resource.getrusage(resource.RUSAGE_SELF)
assert code == 78 and not {{"torch", "deepspeed"}} & set(sys.modules), code
assert used.ru_utime + used.ru_stime < 1.0, used
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_manuals_json_trains_as_the_config_says(tmp_path: Path) -> None:
    """D6: Hugging Face's JSON trains, and DeepSpeed receives no "auto"."""
    (tmp_path / "ds.json").write_text(json.dumps(HUGGING_FACE))
    words = ("--config", TINY, "--ds_config", tmp_path / "ds.json", "--run-dir", tmp_path / "run")
    done = fork("train", *words, "train.steps=2", "supervise.enabled=false")
    assert done.status == ExitCode.DONE, done.err
    received = json.loads((tmp_path / "run" / "deepspeed.json").read_text())
    assert "auto" not in json.dumps(received)
    assert received["zero_optimization"]["allgather_bucket_size"] == 200_000_000
    assert "scheduler" not in received and received["bf16"] == {"enabled": False}


PASSED = {  # DeepSpeed JSON beside the ZeRO stage; every passed key is in one of them
    "buckets": ({}, {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}),
    "overlap": (
        {},
        {"overlap_comm": True, "use_multi_rank_bucket_allreduce": False, "contiguous_gradients": True,
         "reduce_bucket_size": 5000},
    ),
    "offload": ({}, {"offload_optimizer": {"device": "cpu", "pin_memory": True}}),
    "reports": (
        {
            "wall_clock_breakdown": True, "steps_per_print": 1, "disable_python_gc": True,
            "timers": {"throughput": {"enabled": True, "synchronized": False}},
            "flops_profiler": {
                "enabled": True, "profile_step": 1, "module_depth": 1, "top_modules": 1, "detailed": True,
                "recompute_fwd_factor": 0.0,
            },
            "log_level": "info",
        },
        {},
    ),
}  # fmt: skip


STAGES = [("buckets", 2), ("overlap", 1), ("overlap", 2), ("offload", 2), ("reports", 1)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks that share out the experts, trained with each group of passed keys, and without."""
    folder = tmp_path_factory.mktemp("passed")
    words = ("train.steps=2", "parallel.expert=2")
    groups = {"plain": ({}, {}), "scattered": ({}, {"contiguous_gradients": False}), **PASSED}
    cases = [
        case(folder / f"{name}-{stage}", TINY, *words, stage=stage, deepspeed=groups[name][0], zero=groups[name][1])
        for name, stage in [("plain", 1), ("plain", 2), ("scattered", 1), *STAGES]
    ]
    train_together(2, cases, folder)
    return folder


@pytest.mark.parametrize(("name", "stage"), [*STAGES, ("scattered", 1)])
def test_passed_keys_leave_the_numbers_alone(runs: Path, name: str, stage: int) -> None:
    """D1: With a key that DeepSpeed receives, losses, gradient norms and weights are those of the run without it."""
    plain, run = runs / f"plain-{stage}", runs / f"{name}-{stage}"
    records, expected = metrics_of(run), metrics_of(plain)
    assert len(records) == len(expected) == 2
    for record, want in zip(records, expected, strict=True):
        for key in ("loss", "mse", "vlb", "prior_loss", "grad_norm"):
            assert record[key] == pytest.approx(want[key], rel=1e-6), key
    weights = tensors_of(plain, "weight")
    for key, tensor in tensors_of(run, "weight").items():
        assert tensor.allclose(weights[key], rtol=1e-5, atol=1e-7), key


def test_gradients_of_a_bf16_run_can_be_summed_in_float32(tmp_path: Path) -> None:
    """`communication_data_type: fp32`: the sums differ from those in bf16, by at most bf16's rounding."""
    words = ("train.steps=4", "train.precision=bf16", "train.micro_batch=4")
    kinds = {"bf16": {}, "fp32": {"communication_data_type": "fp32"}}
    names = [(kind, stage) for kind in kinds for stage in (1, 2)]
    train_together(
        4,
        [case(tmp_path / f"{kind}-{stage}", TINY, *words, stage=stage, deepspeed=kinds[kind]) for kind, stage in names],
        tmp_path,
    )
    for stage in (1, 2):
        rounded, exact = (metrics_of(tmp_path / f"{kind}-{stage}") for kind in kinds)
        assert [r["grad_norm"] for r in rounded] != [e["grad_norm"] for e in exact]
        for record, want in zip(rounded, exact, strict=True):
            assert record["grad_norm"] == pytest.approx(want["grad_norm"], rel=2**-7), record["step"]


def test_every_passed_key_is_trained_with() -> None:
    """D1: A key joins the table's passed keys only together with a run that shows it to be harmless."""
    from sdit.config.deepspeed_keys import Passed, rules

    tried = {
        ".".join(path)
        for top, keys in PASSED.values()
        for path in leaves({**top, "zero_optimization": {"stage": 1, **keys}})
    }
    passed = {key for key, rule in rules() if isinstance(rule, Passed)}
    assert passed and passed <= tried and {name for name, _ in STAGES} == set(PASSED)


def test_the_manual_holds_the_table() -> None:
    """D3: docs/deepspeed-json.md lists every key (`python -m sdit.config.deepspeed_keys` prints its tables)."""
    from sdit.config.deepspeed_keys import as_markdown

    assert as_markdown() in (ROOT / "docs" / "deepspeed-json.md").read_text()


@pytest.mark.parametrize(
    ("stage", "precision", "zero", "expected"),
    [
        (0, "fp32", {}, None),
        (1, "fp32", {}, False),
        (2, "fp32", {}, False),
        (2, "bf16", {}, False),
        (1, "bf16", {}, None),
        (1, "bf16", {"overlap_comm": True}, False),  # ZeRO's own wrapper
        (2, "fp32", {"offload_optimizer": {"device": "cpu"}}, None),
        (2, "fp32", {"offload_optimizer": {"device": "none"}}, False),
    ],
)
def test_deepspeed_computes_no_norm_where_it_allows_that(
    stage: int, precision: str, zero: dict[str, Any], expected: bool | None
) -> None:
    config = Config.model_validate({"train": {"precision": precision}})
    merged = merge_deepspeed(config, BatchPlan(256, 256, 1), {"zero_optimization": {"stage": stage, **zero}}, "ds.json")
    assert merged["zero_optimization"].get("compute_grad_norm") is expected


@pytest.mark.parametrize(
    ("accumulation", "more", "expected"),
    [
        (1, {"zero_optimization": {"stage": 1}}, True),
        (1, {"zero_optimization": {"stage": 1, "overlap_comm": True}}, False),
        (2, {"zero_optimization": {"stage": 1, "overlap_comm": True}}, True),  # micro-steps are summed in float32
        (
            1,
            {"zero_optimization": {"stage": 1, "overlap_comm": True}, "data_types": {"grad_accum_dtype": "fp32"}},
            True,
        ),
        (1, {"zero_optimization": {"stage": 2}}, False),
        (1, {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, False),
    ],
)
def test_overlapped_reduction_in_bf16_chooses_the_wrapper_of_zero(
    accumulation: int, more: dict[str, Any], expected: bool
) -> None:
    config = Config.model_validate({"train": {"precision": "bf16"}})
    merged = merge_deepspeed(config, BatchPlan(256, 256 // accumulation, accumulation), more, "ds.json")
    assert uses_bf16_optimizer(merged) is expected


@pytest.mark.parametrize(
    ("timer", "expected"), [({}, False), ({"synchronized": False}, False), ({"enabled": True}, True)]
)
def test_the_throughput_timer_is_off_unless_the_json_turns_it_on(timer: dict[str, bool], expected: bool) -> None:
    merged = merge_deepspeed(Config(), BatchPlan(256, 256, 1), {"timers": {"throughput": timer}}, "ds.json")
    assert merged["timers"]["throughput"]["enabled"] is expected
