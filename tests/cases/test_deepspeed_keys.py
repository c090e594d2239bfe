"""Every key that the installed DeepSpeed reads from its JSON has a rule in sdit's table."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import typing
from collections.abc import Iterator, KeysView, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from deepspeed.runtime import config as runtime_config
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config_utils import DeepSpeedConfigModel

from sdit.config import Config, merge_deepspeed
from sdit.errors import ConfigError
from sdit.topology import BatchPlan

SECTIONS = {  # attribute of DeepSpeedConfig -> the JSON's object that it is read from
    "zero_config": "zero_optimization",
    "float16_config": "fp16",
    "bfloat16_config": "bf16",
    "monitor_config": "",
    "hybrid_engine": "hybrid_engine",
    "compile_config": "compile",
    "timers_config": "timers.throughput",
    "tensor_parallel_config": "tensor_parallel",
    "weight_quantization_config": "weight_quantization",
    "expert_parallel_config": "expert_parallel",
}
CONFIG_MODULES = (  # that read the JSON key by key
    "runtime.config", "runtime.zero.config", "runtime.precision_config", "runtime.activation_checkpointing.config",
    "runtime.swap_tensor.aio_config", "runtime.model_checkpointing.config", "runtime.tensor_parallel.config",
    "comm.config", "monitor.config", "profiling.config", "datastates.config", "utils.config",
)  # fmt: skip
READERS = {"get", "get_scalar_param", "get_dict_param", "get_list_param", "pop"}


def is_known(path: str) -> bool:
    """Whether a value that is legal nowhere is refused under a dotted key, and not because the key is unknown."""
    lines = []
    for more in ({}, {"enabled": False}):
        *parents, key = path.split(".")
        content: dict[str, Any] = {**(more if parents else {}), key: "xyzzy"}
        for parent in reversed(parents):
            content = {parent: content}
        try:
            merge_deepspeed(Config(), BatchPlan(256, 256, 1), content, "ds.json")
        except ConfigError as error:
            lines.append(str(error))
        else:
            lines.append("")
    return bool(lines[0]) and not any(f"{path}: unknown key" in line for line in lines)


class Recorder(dict[str, Any]):
    """A JSON object that notes, as dotted keys, which of its keys are looked for."""

    def __init__(self, values: Mapping[str, Any], seen: set[str], prefix: str = "") -> None:
        children = {
            key: Recorder(value, seen, f"{prefix}{key}.") if isinstance(value, dict) else value
            for key, value in values.items()
        }
        super().__init__(children)
        self.seen, self.prefix = seen, prefix

    def __copy__(self) -> Recorder:
        return self

    def __contains__(self, key: object) -> bool:
        self.seen.add(f"{self.prefix}{key}")
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.seen.add(f"{self.prefix}{key}")
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(f"{self.prefix}{key}")
        return super().get(key, default)

    def keys(self) -> KeysView[str]:
        return KeysView(self)  # asks __contains__


EVERYTHING = {  # the objects that DeepSpeed reads key by key
    "train_batch_size": 1,
    "activation_checkpointing": {},
    "aio": {},
    "autotuning": {},
    "bf16": {},
    "checkpoint": {"writer": {"type": "python"}, "parallel_write": {}},
    "comms_logger": {},
    "compile": {},
    "data_efficiency": {},
    "data_types": {},
    "datastates_ckpt": {},
    "expert_parallel": {"enabled": False},
    "flops_profiler": {},
    "fp16": {},
    "hybrid_engine": {},
    "optimizer": {"type": "AdamW", "params": {}},
    "pipeline": {},
    "scheduler": {"type": "WarmupLR", "params": {}},
    "tensor_parallel": {},
    "timers": {"throughput": {}},
    "torch_autocast": {"dtype": "bfloat16", "lower_precision_safe_modules": []},
    "weight_quantization": {},
    "zero_optimization": {},
}


@pytest.fixture(scope="module")
def read() -> tuple[Any, set[str]]:
    """DeepSpeed's parsed configuration, and the dotted keys that it looked for."""
    seen: set[str] = set()
    return runtime_config.DeepSpeedConfig(Recorder(EVERYTHING, seen)), seen


def fields_of(model: type, prefix: str, visited: set[type]) -> Iterator[str]:
    """Yield the dotted keys of a pydantic model or a dataclass, aliases and inner models included."""
    visited.add(model)
    if dataclasses.is_dataclass(model):
        yield from (f"{prefix}{field.name}" for field in dataclasses.fields(model) if not field.name.startswith("_"))
        return
    for name, info in model.model_fields.items():  # type: ignore[attr-defined]
        names = [name] if info.alias is None else [name, info.alias]
        yield from (f"{prefix}{each}" for each in names)
        for inner in (info.annotation, *typing.get_args(info.annotation)):
            if isinstance(inner, type) and issubclass(inner, DeepSpeedConfigModel):
                for each in names:
                    yield from fields_of(inner, f"{prefix}{each}.", visited)


def all_models(base: type = DeepSpeedConfigModel) -> Iterator[type]:
    for model in base.__subclasses__():
        yield model
        yield from all_models(model)


def test_keys_that_deepspeed_looks_for_are_known(read: tuple[Any, set[str]]) -> None:
    """D3: Every key that DeepSpeed looks for in its JSON is in the table."""
    seen = read[1]
    assert {"train_batch_size", "flops_profiler.top_modules", "checkpoint.writer.io_buffer_size"} <= seen
    assert sorted(key for key in seen if not is_known(key)) == []


def test_fields_of_deepspeeds_models_are_known(read: tuple[Any, set[str]]) -> None:
    """D3: Every field of DeepSpeed's configuration models is in the table, and no model is left out."""
    visited: set[type] = set()
    keys: list[str] = []
    found = {**vars(read[0]), "comms": read[0].comms_config.comms_logger}
    sections = {**SECTIONS, "comms": "comms_logger"}
    for name, value in found.items():
        if isinstance(value, DeepSpeedConfigModel) or dataclasses.is_dataclass(value):
            assert name in sections, f"{name}: a new object of the JSON"
            keys += fields_of(type(value), f"{sections[name]}." if sections[name] else "", visited)
    assert len(keys) > 150 and sorted(key for key in keys if not is_known(key)) == []
    of_training = {model for model in all_models() if not model.__module__.startswith("deepspeed.inference")}
    assert of_training - visited == set()


def test_names_in_deepspeeds_readers_are_known() -> None:
    """D3: A key that DeepSpeed reads in some branch only is in the table as well."""
    from sdit.config.deepspeed_keys import rules

    known = {part for path, _ in rules() for part in path.split(".")}
    known |= {name for _, rule in rules() for name in (getattr(rule, "block", None) or "").split()}
    unknown = {}
    for name in CONFIG_MODULES:
        module = importlib.import_module(f"deepspeed.{name}")
        names = set(names_read(module))
        unknown[name] = sorted(names - known - {"_tp_plan"})  # an attribute of a model
    assert {name: names for name, names in unknown.items() if names} == {}
    assert "sequence_parallel_size" in names_read(runtime_config)


def names_read(module: Any) -> Iterator[str]:
    """Yield the constant names that a module's code looks up in a dictionary."""
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        arguments: list[ast.expr] = []
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            arguments = node.args[: 1 if isinstance(node.func, ast.Attribute) else 2] if called in READERS else []
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            arguments = [node.left]
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            arguments = [node.slice]
        for argument in arguments:
            value = getattr(module, argument.id, None) if isinstance(argument, ast.Name) else None
            value = argument.value if isinstance(argument, ast.Constant) else value
            if isinstance(value, str) and value.isidentifier():
                yield value


def test_removed_keys_are_known() -> None:
    """D3: Every key that DeepSpeed 0.19.8 no longer accepts is in the table."""
    removed = [*runtime_config._REMOVED_TOP_LEVEL_CONFIG_KEYS]
    removed += [f"zero_optimization.{key}" for key in runtime_config._REMOVED_ZERO_CONFIG_KEYS]
    assert len(removed) > 10 and [key for key in removed if not is_known(key)] == []


def test_parameters_of_deepspeeds_schedulers_are_known() -> None:
    """D6: Every parameter of every scheduler of DeepSpeed may be "auto"."""
    for name in lr_schedules.VALID_LR_SCHEDULES:
        parameters = inspect.signature(getattr(lr_schedules, name).__init__).parameters
        names = [key for key in parameters if key not in ("self", "optimizer", "args", "kwargs")]
        assert names and [key for key in names if not is_known(f"scheduler.params.{key}")] == []


def test_the_table_is_of_the_installed_version() -> None:
    """D3: A new DeepSpeed needs a look at the table first."""
    assert deepspeed.__version__.split("+")[0] == "0.19.8"


def test_a_new_key_is_noticed() -> None:
    """D3: The walk finds a key that the table does not have."""
    assert not is_known("zero_optimization.brand_new") and not is_known("brand_new") and not is_known("fp16.brand_new")
    assert is_known("amp.anything") and is_known("fp16.loss_scale")
    seen: set[str] = set()
    recorder = Recorder({"block": {}}, seen)
    names = recorder.keys()
    assert "brand_new" not in names and recorder.get("other") is None and recorder["block"].get("x") is None
    assert seen == {"brand_new", "other", "block", "block.x"}
