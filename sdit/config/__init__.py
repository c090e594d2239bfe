"""The settings of a run: schema, YAML files and overrides, the DeepSpeed JSON, and the resolved run. It imports no torch.

Other packages of sdit import from this package, not from its modules.
"""

from sdit.config.deepspeed_file import read_deepspeed_json
from sdit.config.deepspeed_json import merge_deepspeed
from sdit.config.loading import (
    config_keys,
    config_manual,
    describe_error,
    dump_config,
    flatten,
    is_inside_null,
    is_path,
    load_config,
    parse_config,
    parse_stored_config,
    read_yaml,
    shown,
)
from sdit.config.model import SIZES, DtrConfig, ExpertsConfig, ModelConfig, MoeConfig
from sdit.config.resolved import ResolvedRun, check_trainable, largest_world, resolve_run
from sdit.config.schema import (
    EXCHANGE_SPEEDS,
    MAX_SIGMA_REL,
    CheckpointConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    EmaConfig,
    ObserveConfig,
    OptimizerConfig,
    ParallelConfig,
    PriorConfig,
    SampleConfig,
    SuperviseConfig,
    TrainConfig,
    ValidationConfig,
)
from sdit.config.yaml_text import dump_yaml

__all__ = [
    "EXCHANGE_SPEEDS",
    "MAX_SIGMA_REL",
    "SIZES",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "DtrConfig",
    "EmaConfig",
    "ExpertsConfig",
    "ModelConfig",
    "MoeConfig",
    "ObserveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PriorConfig",
    "ResolvedRun",
    "SampleConfig",
    "SuperviseConfig",
    "TrainConfig",
    "ValidationConfig",
    "check_trainable",
    "config_keys",
    "config_manual",
    "describe_error",
    "dump_config",
    "dump_yaml",
    "flatten",
    "from this package",
    "is_inside_null",
    "is_path",
    "largest_world",
    "load_config",
    "merge_deepspeed",
    "not from its modules.",
    "parse_config",
    "parse_stored_config",
    "read_deepspeed_json",
    "read_yaml",
    "resolve_run",
    "shown",
]
