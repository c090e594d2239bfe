"""What a resumed run keeps and what it changes: its length in images, and the settings that differ from the checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from sdit.clock import Clock
from sdit.config import Config, TrainConfig, config_keys, flatten, is_inside_null
from sdit.errors import CheckpointError, ConfigError
from sdit.redact import redact

LENGTH_KEYS = ("train.steps", "train.images")
FIXED = (
    "seed", "diffusion.path", "diffusion.prediction", "diffusion.schedule", "data.source", "data.streams", "train.freeze",
)  # fmt: skip
INIT_KEYS = ("train.init_from", "train.init_ema", "train.init_code", "train.init_allow")
AVERAGE_KEYS = ("ema.decays", "ema.sigma_rel")
FREE_MODEL_KEYS = ("experts.capacity_factor", "experts.capacity_factor_eval", "experts.drop_policy", "size")


@dataclass(frozen=True)
class Resumed:
    """What the checkpoint says of the run so far.

    `length_images`: the run's length from now on; `stored_images`: the length that the checkpoint was written for;
    `last_batch`: images of its newest step.
    """

    length_images: int
    stored_images: int
    last_batch: int


def compare_configs(old: dict[str, Any], new: dict[str, Any], where: str) -> list[str]:
    """Return the keys that changed, as `key: old -> new`. Raises: ConfigError for those that make it another run."""
    defaults = {key: default for key, _, default in config_keys()}  # for keys that a newer version added
    stored = {key: value for key, value in flatten(old).items() if key in defaults}  # without keys that are gone
    before = {key: default for key, default in defaults.items() if not is_inside_null(key, old)} | stored
    after = flatten(new)
    changes = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key):
            continue
        section, _, rest = key.partition(".")
        if key in FIXED or (section == "model" and rest not in FREE_MODEL_KEYS):
            raise ConfigError(
                f"{key}: {after.get(key)!r} disagrees with {before.get(key)!r} of the checkpoint {where}; "
                "legal: the same value, or another run_dir"
            )
        changes.append(f"{key}: {before.get(key)!r} -> {after.get(key)!r}")
    return changes


def read_length(manifest: Mapping[str, Any], config: Config) -> Resumed:
    """Return the length of a run that continues from a checkpoint.

    A length is fixed in images when the run starts. Another `train.global_batch` does not change it; another
    `train.steps` or `train.images` does. A checkpoint of an older version states no length: its config gives it.
    Raises: CheckpointError.
    """
    try:
        before = TrainConfig.model_validate(manifest["config"]["train"])
    except (KeyError, TypeError, ValidationError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"the checkpoint's config has no usable section train ({reason})") from None
    stored = manifest.get("length_images") or before.total_images
    is_same = (before.steps, before.images) == (config.train.steps, config.train.images)
    return Resumed(stored if is_same else config.train.total_images, stored, before.global_batch)


def describe_resume(changes: Sequence[str], resumed: Resumed, config: Config, clock: Clock) -> str:
    """Return one block: a line for each change `key: old -> new` with what it does; empty if nothing changed."""
    if not changes:
        return ""
    count = f"{len(changes)} setting{'s differ' if len(changes) > 1 else ' differs'}"
    lines = [f"  {redact(change)}{_effect(change.partition(':')[0], resumed, config, clock)}" for change in changes]
    return "\n".join([f"resume: {count} from the checkpoint's:", *lines])


def _effect(key: str, resumed: Resumed, config: Config, clock: Clock) -> str:
    """What the change of a key does: its line of --help, and for length and batch what becomes of the run."""
    described = {name: info.description or "" for name, info, _ in config_keys()}
    texts = [described[key]] if described.get(key) else []
    if key in INIT_KEYS:
        texts = ["no effect: only a new run reads train.init_from, and this one continues from its checkpoint"]
    if key in AVERAGE_KEYS:
        texts.append("an average that the checkpoint does not hold starts at the checkpoint's weights")
    if key in LENGTH_KEYS:
        texts.append(_length(resumed, clock))
    if key == "train.global_batch":
        if resumed.length_images == resumed.stored_images:
            texts.append(_length(resumed, clock))
        steps = -(-max(0, resumed.length_images - clock.images_seen) // config.train.global_batch)
        texts.append(f"{steps} steps remain; ema.decay and intervals in steps count steps of the new size")
    return f" ({'; '.join(texts)})" if texts else ""


def _length(resumed: Resumed, clock: Clock) -> str:
    """What becomes of the run's length, and with it of the learning rate's decay."""
    if resumed.length_images == resumed.stored_images:
        return f"the run's length and schedule stay at {resumed.length_images} images"
    text = f"the run's length and schedule change from {resumed.stored_images} to {resumed.length_images} images"
    if resumed.length_images <= clock.images_seen:
        text += f", and {clock.images_seen} are seen already: the run ends at once"
    return text
