"""The config.json of a transformer in a diffusers folder, and the model section that it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdit.config import ModelConfig
from sdit.errors import ConfigError
from sdit.interop.diffusers_names import STOCK_CLASS
from sdit.model.build import parse_model_config

CUSTOM_CLASS = "SditTransformer2DModel"  # of `diffusers_files/sdit_transformer.py`; its weights have published names
STOCK_CLASSES = (STOCK_CLASS, "Transformer2DModel")  # the second is the name in older folders

FIXED = {  # the only values of the config that compute DiT's function
    "attention_bias": (True,),
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
}
STOCK_KEYS = {
    "num_layers": "depth",
    "patch_size": "patch_size",
    "sample_size": "input_size",
    "in_channels": "channels",
    "num_attention_heads": "heads",
    "num_embeds_ada_norm": "classes",
}
# Keys that are not options of the backbone, and the options that CUSTOM_CLASS has.
COMMON = {*STOCK_KEYS.values(), "size", "width", "learn_variance", "variant", "timesteps"}
EXPORTED = {"mlp_ratio", "norm", "ffn", "qk_norm", "rope", "positions", "time_scale", "position_base"}
SECTIONS = {"switch": "experts", "dtr": "dtr"}  # the section that only this variant uses


def model_config_of(config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Return the model section for the config.json of a transformer.

    Raises: ConfigError: if it is not that of a DiT. The message names `where`, key, value and what is legal.
    """
    name = config.get("_class_name")
    if name not in (*STOCK_CLASSES, CUSTOM_CLASS):
        legal = ", ".join((STOCK_CLASS, CUSTOM_CLASS))
        raise ConfigError(f"{where}: _class_name: {str(name)[:80]} is not a DiT; legal: {legal}")
    for key, legal_values in FIXED.items():
        if config.get(key, legal_values[0]) not in legal_values:
            raise ConfigError(f"{where}: {key}: {config[key]!r} is not DiT's; legal: {legal_values[0]!r}")
    needed = (*STOCK_KEYS, "attention_head_dim")
    missing = [key for key in needed if not isinstance(config.get(key), int)]
    if missing:
        raise ConfigError(f"{where}: {missing[0]}: {config.get(missing[0])!r} is not legal; legal: a whole number")
    channels, out = config["in_channels"], config.get("out_channels") or config["in_channels"]
    if out not in (channels, 2 * channels):
        legal = f"{channels}, {2 * channels}"
        raise ConfigError(f"{where}: out_channels: {out!r} for in_channels {channels}; legal: {legal}")
    values: dict[str, Any] = {ours: config[theirs] for theirs, ours in STOCK_KEYS.items()}
    values |= {"width": config["num_attention_heads"] * config["attention_head_dim"], "variant": "dit"}
    values["learn_variance"] = out == 2 * channels
    if name == CUSTOM_CLASS:
        values |= {key: value for key, value in config.items() if key in ModelConfig.model_fields}
    try:
        return parse_model_config(values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def is_plain(config: ModelConfig) -> bool:
    """Return True if `DiTTransformer2DModel` can hold the model: a DiT with labels and the default backbone."""
    return config.variant == "dit" and config.classes > 0 and not backbone_options(config)


def backbone_options(config: ModelConfig) -> dict[str, Any]:
    """Return the options of the backbone that are not DiT's, by key of the section `model`."""
    default = ModelConfig().model_dump()
    options = {key: value for key, value in config.model_dump().items() if key not in COMMON | set(SECTIONS.values())}
    return {key: value for key, value in options.items() if value != default[key]}


def diffusers_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of the transformer: that of `DiTTransformer2DModel`, or of the class that is exported with it.

    Raises: ConfigError: if neither class has an option of the model.
    """
    plain = is_plain(config)
    for key, value in backbone_options(config).items():
        if key not in EXPORTED:
            raise ConfigError(f"model.{key}: {str(value)[:80]} has no form in diffusers; legal: --format safetensors")
    values: dict[str, Any] = {"_class_name": STOCK_CLASS if plain else CUSTOM_CLASS}
    values |= {theirs: getattr(config, ours) for theirs, ours in STOCK_KEYS.items()}
    values |= {"attention_head_dim": config.width // config.heads, "out_channels": config.out_channels}
    if plain:
        fixed = {key: legal[0] for key, legal in FIXED.items()}
        others = {"norm_eps": 1e-6, "dropout": 0.0, "norm_num_groups": 32, "upcast_attention": False}
        return values | fixed | others
    section = SECTIONS.get(config.variant)
    if section:
        values[section] = getattr(config, section).model_dump()
    return values | {"variant": config.variant, "timesteps": config.timesteps} | backbone_options(config)
