"""Merges the DeepSpeed JSON with the YAML config. If the two disagree, an error names both."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from sdit.config.deepspeed_keys import (
    KEYS,
    SCHEDULE,
    Block,
    Ours,
    Passed,
    Refused,
    Renamed,
    Rule,
    Shared,
    harmless_text,
    is_one_of,
    rules,
)
from sdit.config.schema import Config
from sdit.errors import ConfigError
from sdit.topology import BatchPlan

COMMENT_MARKS = ("_", "//", "#")  # a key with this prefix is a comment
COMMENT_NAMES = ("comment", "comments")
DEFAULT_STAGE = 1  # of "stage": "auto", as in configs/deepspeed/zero1.json
SHOWN_LETTERS = 60


def zero_stage(values: dict[str, Any], source: str) -> int:
    """Return the ZeRO stage (0, 1 or 2) in a DeepSpeed JSON.

    Raises: ConfigError: if the stage is not supported.
    """
    section = values.get("zero_optimization", {})
    if section is False or section is None:
        return 0
    if section == "auto":
        return DEFAULT_STAGE
    if not isinstance(section, dict):
        raise ConfigError(
            f"{source}: zero_optimization: {_shown(section)} is not legal; "
            'legal: an object such as {"stage": 1}, or false'
        )
    stage = section.get("stage", 0)
    if stage == "auto":
        return DEFAULT_STAGE
    if not is_one_of(stage, (0, 1, 2)):
        raise ConfigError(
            f"{source}: zero_optimization.stage: {_shown(stage)} is not supported; legal: 0, 1, 2 "
            "(stage 3 does not support expert-parallel layers; shard experts with parallel.expert and use stage 2)"
        )
    return int(stage)


def merge_deepspeed(config: Config, split: BatchPlan, values: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the JSON for `deepspeed.initialize`: the passed keys of `values` and the values of the config.

    Raises: ConfigError: if a key is unknown, a value is not legal, a shared value differs from the config's, or only the
        config may set the key. The message names the key, its value and the legal values.
    """
    stage = zero_stage(values, source)
    reader = _KeyReader(source)
    merged: dict[str, Any] = {}
    reader.read(values, KEYS, "", merged)
    agreed = _agreed_values(config, split, stage)
    for key, (value, setting) in reader.shared.items():
        _require_agreement(key, value, setting, *agreed[key], source)
    zero = merged.setdefault("zero_optimization", {})
    _check_stage(zero, stage, source)
    _check_scheduler(values, source)
    zero["stage"] = stage
    merged.update(
        train_batch_size=split.global_batch,
        train_micro_batch_size_per_gpu=split.micro_batch,
        gradient_accumulation_steps=split.accumulation,
        gradient_clipping=0.0,  # sdit clips by the exact norm over all experts, see Engine.step
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
    )
    merged.setdefault("steps_per_print", 1 << 40)
    wanted, _ = reader.shared.get("data_types.grad_accum_dtype", (None, ""))
    can_overlap = stage == 1 and split.accumulation == 1 and not _same(wanted, "fp32")
    fp32_gradients = stage > 0 and not (can_overlap and zero.get("overlap_comm") is True)
    _set_precision(merged, config, fp32_gradients)
    sums, _ = reader.shared.get("communication_data_type", (None, ""))
    if _same(sums, "fp32"):
        merged["communication_data_type"] = "fp32"  # of gradients, summed over the ranks
    _remove_host_waits(merged, stage)
    return merged


class _KeyReader:
    """Reads a JSON by the table of keys.

    `shared` holds (value, key of the config) of the values that must agree with the config.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.shared: dict[str, tuple[Any, str]] = {}

    def read(self, values: Mapping[str, Any], keys: Mapping[str, Rule], prefix: str, passed: dict[str, Any]) -> None:
        """Read one object and put the values that DeepSpeed receives into `passed`.

        Raises: ConfigError: if a key is unknown or a value is not legal.
        """
        for key, value in self._named(values, keys, prefix).items():
            rule, path = keys[key], f"{prefix}{key}"
            if isinstance(rule, Block):
                self._read_block(rule, path, value, passed.setdefault(key, {}))
                if not passed[key]:
                    del passed[key]
            elif is_one_of(value, ("auto",)):
                continue
            elif isinstance(rule, Shared):
                self.shared[path] = value, rule.setting
            elif isinstance(rule, Passed):
                passed[key] = self._legal(rule, path, value)
            elif isinstance(rule, Ours | Refused):
                self._require_harmless(rule, path, value)

    def _named(self, values: Mapping[str, Any], keys: Mapping[str, Rule], prefix: str) -> dict[str, Any]:
        """Return the object without comments and with old names replaced.

        Raises: ConfigError: if a key is unknown, or an old and a new name are both given.
        """
        named: dict[str, Any] = {}
        for key, value in _without_comments(values).items():
            self._require_known(key, keys, prefix)
            rule, name = keys[key], key
            if isinstance(rule, Renamed):
                name = rule.name
                if name in values:
                    raise ConfigError(
                        f"{self.source}: {prefix}{key}: is an old name of {prefix}{name}, and both are given; "
                        f"legal: {prefix}{name}"
                    )
                if rule.values is not None and not isinstance(value, bool | None):
                    raise self._illegal(f"{prefix}{key}", value, "true, false")
                if rule.values is not None:
                    value = rule.values.get(value)
            named[name] = value
        return named

    def _read_block(self, rule: Block, path: str, value: Any, passed: dict[str, Any]) -> None:
        if isinstance(value, dict):
            self.read(value, rule.keys, f"{path}.", passed)
        elif not is_one_of(value, rule.absent):
            raise self._illegal(path, value, "an object")

    def _legal(self, rule: Passed, path: str, value: Any) -> Any:
        whole = isinstance(value, float) and value.is_integer() and rule.legal.whole
        number = int(value) if whole else value  # users write bucket sizes as 5e8
        if not rule.legal.allows(number):
            raise self._illegal(path, value, f'{rule.legal.text}, "auto"')
        return number

    def _require_harmless(self, rule: Ours | Refused, path: str, value: Any) -> None:
        """Check that a key that DeepSpeed does not receive would have no effect.

        Raises: ConfigError: if it would have an effect.
        """
        if rule.block is None:
            if is_one_of(value, rule.harmless):
                return
            shown = f"{path}: {_shown(value)}"
        else:
            if isinstance(value, dict):
                value = _without_comments(value)
            if is_one_of(value, (None, False, {})):
                return
            if isinstance(value, dict) and is_one_of(value.get("enabled"), (False, "auto")):
                for key in value if rule.block else ():
                    self._require_known(key, rule.block.split(), f"{path}.")
                return
            shown = f"{path}:"
        if isinstance(rule, Ours):
            raise ConfigError(
                f"{self.source}: {shown} is not for the DeepSpeed JSON; "
                f"legal: set {rule.setting} in the YAML config, and {harmless_text(rule)} or nothing here"
            )
        raise ConfigError(
            f"{self.source}: {shown} is not supported: {rule.reason}; legal: {harmless_text(rule)}, or no such key"
        )

    def _require_known(self, key: str, keys: Collection[str], prefix: str) -> None:
        if key not in keys:
            raise ConfigError(f"{self.source}: {_shown_key(prefix + key)}: unknown key{_guess(key, keys, prefix)}")

    def _illegal(self, path: str, value: Any, legal: str) -> ConfigError:
        return ConfigError(f"{self.source}: {path}: {_shown(value)} is not legal; legal: {legal}")


def _without_comments(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in values.items()
        if not key.startswith(COMMENT_MARKS) and key.lower() not in COMMENT_NAMES
    }


def _guess(key: str, keys: Collection[str], prefix: str) -> str:
    """Return "; did you mean KEY?" for the nearest key of the same object, or for the same key of another object."""
    wanted = key.lower()
    elsewhere = [path for path, _ in rules() if path.rpartition(".")[2] == wanted]
    lowered = {known.lower(): known for known in keys}
    near = difflib.get_close_matches(wanted, lowered, n=1, cutoff=0.6)
    if near and (near[0] == wanted or not elsewhere):
        return f"; did you mean {prefix}{lowered[near[0]]}?"
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return "; docs/deepspeed-json.md lists the keys; a comment is a key that begins with _ or //"


def _agreed_values(config: Config, split: BatchPlan, stage: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Return, by dotted key of the JSON, the config's value and the JSON values that agree with it."""
    optimizer, precision = config.optimizer, config.train.precision
    kind = {"adamw": "AdamW", "muon": "Muon", "sgd": "SGD"}[optimizer.kind]
    betas = [optimizer.beta1, optimizer.beta2]
    clip = optimizer.clip_grad_norm
    clips = (0.0, None) if clip is None else (clip,)
    accumulated = precision if stage == 0 else "fp32"
    return {
        "train_batch_size": (split.global_batch, (split.global_batch,)),
        "train_micro_batch_size_per_gpu": (split.micro_batch, (split.micro_batch,)),
        "gradient_accumulation_steps": (split.accumulation, (split.accumulation,)),
        "gradient_clipping": (clip, clips),
        "bf16.enabled": (precision, (precision == "bf16",)),
        "optimizer.type": (optimizer.kind, (kind,)),
        "optimizer.params.lr": (optimizer.learning_rate, (optimizer.learning_rate,)),
        "optimizer.params.betas": (betas, (betas,)),
        "optimizer.params.eps": (optimizer.epsilon, (optimizer.epsilon,)),
        "optimizer.params.weight_decay": (optimizer.weight_decay, (optimizer.weight_decay,)),
        "optimizer.params.max_grad_norm": (clip, clips),
        "communication_data_type": (precision, (None, precision, "fp32")),
        "data_types.grad_accum_dtype": (precision, (accumulated, None)),
    }


def _require_agreement(key: str, value: Any, setting: str, ours: Any, agreed: tuple[Any, ...], source: str) -> None:
    if not any(_same(value, each) for each in agreed):
        legal = ", ".join(json.dumps(each) for each in agreed)
        raise ConfigError(
            f"{source}: {key}: {_shown(value)} disagrees with {setting}: {json.dumps(ours)} of the YAML config; "
            f'legal: {legal}, "auto"'
        )


def _same(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        if not isinstance(value, list) or len(value) != len(wanted):
            return False
        return all(each == "auto" or _same(each, other) for each, other in zip(value, wanted, strict=True))
    if isinstance(wanted, str) and isinstance(value, str):
        return value.lower() == wanted.lower()
    return is_one_of(value, (wanted,))


def _check_stage(zero: dict[str, Any], stage: int, source: str) -> None:
    """Refuse passed keys that have no effect at this stage, or with which DeepSpeed cannot train experts.

    Raises: ConfigError: if there is such a key.
    """
    device = zero.get("offload_optimizer", {}).get("device", "none")
    if device != "none" and stage == 0:
        raise ConfigError(
            f'{source}: zero_optimization.offload_optimizer.device: "{device}" has no effect at stage 0; '
            'legal: "none", or stage 1 or 2'
        )
    if zero.get("contiguous_gradients") is False and stage == 2:
        raise ConfigError(
            f"{source}: zero_optimization.contiguous_gradients: false cannot train experts at stage 2; "
            "legal: true, or stage 0 or 1"
        )


def _check_scheduler(values: Mapping[str, Any], source: str) -> None:
    """Refuse a scheduler without parameters, because DeepSpeed would use default numbers.

    Raises: ConfigError: if there is one.
    """
    scheduler = values.get("scheduler")
    if not isinstance(scheduler, dict) or scheduler.get("params"):
        return
    if not is_one_of(scheduler.get("type"), (None, "auto")):
        raise ConfigError(
            f"{source}: scheduler.type: {_shown(scheduler['type'])} without scheduler.params; "
            f'legal: set {SCHEDULE} in the YAML config, and "scheduler": "auto" or nothing here'
        )


def uses_bf16_optimizer(merged: Mapping[str, Any]) -> bool:
    """Return True if DeepSpeed wraps the optimizer in `BF16_Optimizer`, which keeps all gradients in float32."""
    accumulates_fp32 = merged.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    is_stage_1 = merged["zero_optimization"]["stage"] == 1
    return bool(merged["bf16"]["enabled"] and is_stage_1 and accumulates_fp32 and not offloads_optimizer(merged))


def offloads_optimizer(merged: Mapping[str, Any]) -> bool:
    """Return True if a DeepSpeed JSON keeps masters and moments in host memory."""
    offload = merged["zero_optimization"].get("offload_optimizer") or {}
    return bool(offload.get("device", "none") != "none")


def _set_precision(merged: dict[str, Any], config: Config, fp32_gradients: bool) -> None:
    """Set the precision of weights, and of gradients that are summed over micro-steps.

    With float32 gradients at stage 1, DeepSpeed uses `BF16_Optimizer`, which cannot reduce gradients during the backward pass.
    Without accumulation there is no sum, and `overlap_comm: true` chooses the wrapper of ZeRO.
    """
    bf16 = config.train.precision == "bf16"
    merged["bf16"] = {"enabled": bf16}
    if bf16:
        merged["bf16"]["check_grad_overflow"] = False  # sdit checks it before the step, equally on all ranks
        if fp32_gradients:
            merged["data_types"] = {"grad_accum_dtype": "fp32"}


def _remove_host_waits(merged: dict[str, Any], stage: int) -> None:
    """Turn off what makes the host wait for the device: DeepSpeed's throughput timer, and its gradient norm.

    sdit computes the norm itself. DeepSpeed refuses `compute_grad_norm: false` at stage 0, with offload, and with the
    wrapper of stage 1 in bf16, `BF16_Optimizer`.
    """
    merged.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    zero = merged["zero_optimization"]
    if stage > 0 and not offloads_optimizer(merged) and not uses_bf16_optimizer(merged):
        zero["compute_grad_norm"] = False


def _shown(value: Any) -> str:
    """Return a JSON value in one short line."""
    text = json.dumps(value)
    return text if len(text) <= SHOWN_LETTERS else f"{text[: SHOWN_LETTERS - 3]}..."


def _shown_key(key: str) -> str:
    """Return a key unchanged, or quoted and shortened if it holds unusual characters."""
    return key if re.fullmatch(r"[\w.-]{1,100}", key, re.ASCII) else _shown(key)
