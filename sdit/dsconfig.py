"""The DeepSpeed JSON beside our YAML: what each may say, and an error naming both where they disagree."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sdit.config import Config
from sdit.errors import ConfigError
from sdit.redact import holds_credential, redact
from sdit.textfile import read_text, text_problem
from sdit.topology import BatchPlan

MAX_DEPTH = 16
MAX_DIGITS = 20  # of a whole number, enough for 64 bits
MAX_TEXT = 80

OURS = {  # keys that only the YAML decides, with the YAML key to use
    "scheduler": "optimizer.warmup_images, optimizer.decay",
    "fp16": "train.precision (fp32 or bf16)",
    "amp": "train.precision (fp32 or bf16)",
    "data_efficiency": "data.*",
    "curriculum_learning": "data.*",
    "activation_checkpointing": "parallel.activation_checkpointing",
    "pipeline": "parallel.*",
    "tensor_parallel": "parallel.*",
    "expert_parallel": "parallel.expert",
    "zenflow": "configs/deepspeed/zero2_offload.json",
}


def read_deepspeed_json(path: str | Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises:
        ConfigError: the file is unreadable, or holds duplicate keys, deep nesting, infinite or huge numbers, or a credential.
    """
    text = read_text(path)
    try:
        values = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite, parse_int=_bounded
        )
        _check(values, 0)
    except RecursionError:
        raise ConfigError(f"{path}: is not valid JSON: it is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return values


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:MAX_DIGITS]} is not finite")
    return value


def _bounded(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has more than {MAX_DIGITS} digits")
    return int(text)


def _check(value: Any, depth: int) -> None:
    """Refuse deep nesting, control characters and credentials. Raises: ValueError."""
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, str):
        if problem := text_problem(value):
            raise ValueError(f"a text {problem}")
        if holds_credential(value):
            raise ValueError("a text holds a credential, and the JSON is written to the run's files")
    for part in (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check(part, depth + 1)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {redact(key[:MAX_TEXT])!r} is given twice")
        values[key] = value
    return values


def zero_stage(values: dict[str, Any], source: str) -> int:
    """Return the ZeRO stage (0, 1 or 2) a DeepSpeed JSON asks for."""
    section = values.get("zero_optimization", {})
    if section is False or section is None:
        return 0
    stage = section.get("stage", 0) if isinstance(section, dict) else None
    if stage not in (0, 1, 2) or isinstance(stage, bool):
        raise ConfigError(
            f"{source}: zero_optimization.stage: {stage!r} is not supported; legal: 0, 1, 2 "
            "(stage 3 cannot hold expert-parallel layers: spread experts with parallel.expert and use stage 2)"
        )
    return stage


def merge_deepspeed(config: Config, split: BatchPlan, values: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the JSON `deepspeed.initialize` gets: `values` with every `"auto"` and unset shared key filled from the YAML.

    Raises:
        ConfigError: a shared value that is set and differs, or a key that only the YAML may set; both sources are named.
    """
    merged = json.loads(json.dumps(values))
    for key, yaml_key in OURS.items():
        section = merged.get(key)
        if section and not (isinstance(section, dict) and section.get("enabled") is False):
            raise ConfigError(
                f"{source}: {key}: is not for the DeepSpeed JSON; legal: set {yaml_key} in the YAML config"
            )
        merged.pop(key, None)
    zero = _section(merged, "zero_optimization", source)
    stage = zero_stage(values, source)
    if zero.get("reduce_scatter") is False:
        raise ConfigError(
            f"{source}: zero_optimization.reduce_scatter: false would mix different experts' gradients; legal: true"
        )
    optimizer = config.optimizer
    shared: list[tuple[str, Any, str]] = [
        ("train_batch_size", split.global_batch, "train.global_batch"),
        ("train_micro_batch_size_per_gpu", split.micro_batch, "train.micro_batch"),
        ("gradient_accumulation_steps", split.accumulation, "train.global_batch / (train.micro_batch x ranks)"),
        ("gradient_clipping", optimizer.clip_grad_norm or 0.0, "optimizer.clip_grad_norm"),
        ("bf16.enabled", config.train.precision == "bf16", "train.precision"),
        ("optimizer.type", {"adamw": "AdamW", "sgd": "SGD"}[optimizer.kind], "optimizer.kind"),
        ("optimizer.params.lr", optimizer.learning_rate, "optimizer.learning_rate"),
        ("optimizer.params.betas", [optimizer.beta1, optimizer.beta2], "optimizer.beta1, optimizer.beta2"),
        ("optimizer.params.eps", optimizer.epsilon, "optimizer.epsilon"),
        ("optimizer.params.weight_decay", optimizer.weight_decay, "optimizer.weight_decay"),
    ]
    for key, wanted, yaml_key in shared:
        _agree(merged, key, wanted, yaml_key, source)
    merged.pop("optimizer", None)  # built by us: the uncertainty weights need their own group
    merged.update(
        train_batch_size=split.global_batch,
        train_micro_batch_size_per_gpu=split.micro_batch,
        gradient_accumulation_steps=split.accumulation,
        gradient_clipping=0.0,  # clipped by the engine on the exact norm over all experts, see parallel/gradients.py
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
    )
    merged.setdefault("steps_per_print", 1 << 40)
    zero["stage"] = stage
    merged["zero_optimization"] = zero
    _set_precision(merged, config, stage)
    return merged


def _set_precision(merged: dict[str, Any], config: Config, stage: int) -> None:
    bf16 = config.train.precision == "bf16"
    merged["bf16"] = {**(merged.get("bf16") or {}), "enabled": bf16}
    if bf16:
        merged["bf16"]["check_grad_overflow"] = False  # checked by us, before the step, on all ranks alike
        if stage > 0:
            merged.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")


def _section(values: dict[str, Any], key: str, source: str) -> dict[str, Any]:
    section = values.setdefault(key, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{source}: {key}: must be an object")
    return section


def _agree(values: dict[str, Any], key: str, wanted: Any, yaml_key: str, source: str) -> None:
    node: Any = values
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return
        node = node[part]
    same = str(node).lower() == str(wanted).lower() if isinstance(wanted, str) else node == wanted
    if node != "auto" and not same:
        raise ConfigError(
            f"{source}: {key}: {json.dumps(node)} disagrees with {yaml_key}: {json.dumps(wanted)} of the YAML config; "
            'legal: the same value, or "auto"'
        )
