"""Optional sinks for a run's numbers and images. A failing sink cannot stop the run."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sdit.clock import Clock
from sdit.config import ObserveConfig
from sdit.data.pixels import to_pixels
from sdit.errors import ConfigError
from sdit.observe.sample_grids import grid_pixels, shown_channels
from sdit.redact import redact
from sdit.train.events import Observer, OnFailure
from sdit.train.record import StepRecord, Validation

FINISH_SECONDS = 20.0  # limit for W&B to send the rest, because a run that must stop cannot wait longer
MAX_SERIES = 256  # of one key; more curves are not useful
_log = logging.getLogger(__name__)


def require_packages(config: ObserveConfig) -> None:
    """Check that the packages of the configured sinks are installed.

    Raises: ConfigError: if one is missing. The message names the pip extra.
    """
    wanted = (
        (config.tensorboard, "observe.tensorboard: true", "tensorboardX", "false"),
        (config.wandb != "off", f"observe.wandb: {config.wandb}", "wandb", "off"),
    )
    for is_wanted, key, package, off in wanted:
        if is_wanted and find_spec(package) is None:
            raise ConfigError(f"{key} needs the package {package}: pip install sdit[observe]; legal without it: {off}")


class TensorBoard(Observer):
    """Writes event files to RUN/tensorboard. The horizontal axis is images seen."""

    name, on_failure = "TensorBoard", OnFailure.DROP

    def __init__(self, run_dir: Path, has_images: bool = True) -> None:
        self._folder, self._has_images = run_dir / "tensorboard", has_images
        self._writer: Any = None

    def on_start(self, clock: Clock, total_images: int, message: str) -> None:
        from tensorboardX import SummaryWriter  # an optional package

        # Values in older files that the resumed run writes again are hidden.
        self._writer = SummaryWriter(str(self._folder), purge_step=clock.images_seen + 1)
        self.on_event(clock, "start", message)

    def on_step(self, clock: Clock, record: StepRecord) -> None:
        if record.logged:
            self._add(clock, record)

    def on_validation(self, clock: Clock, validation: Validation) -> None:
        self._add(clock, validation)

    def _add(self, clock: Clock, values: Validation) -> None:
        for key, value in scalars(values.as_dict()):
            self._writer.add_scalar(key, value, clock.images_seen)

    def on_samples(self, clock: Clock, images: np.ndarray, labels: np.ndarray, columns: int) -> None:
        if not self._has_images:
            return
        pixels = grid_pixels(to_pixels(shown_channels(images)), columns)
        self._writer.add_image("samples", pixels, clock.images_seen, dataformats="HWC" if pixels.ndim == 3 else "HW")

    def on_event(self, clock: Clock, kind: str, text: str) -> None:
        self._writer.add_text(kind, redact(text), clock.images_seen)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases(Observer):
    """A W&B run with the name of the run folder, over images seen.

    Offline runs are in RUN/wandb until `wandb sync` uploads them.
    """

    name, on_failure = "Weights & Biases", OnFailure.DROP

    def __init__(self, run_dir: Path, config: ObserveConfig, facts: Mapping[str, Any], has_images: bool = True) -> None:
        """Take the whole config of the run as `facts`, which W&B shows."""
        self._run_dir, self._config, self._facts, self._has_images = run_dir, config, facts, has_images
        self._run: Any = None

    def on_start(self, clock: Clock, total_images: int, message: str) -> None:
        import wandb  # an optional package

        mode = self._config.wandb
        if mode == "off":
            return
        name = self._run_dir.resolve().name
        identity = hashlib.sha256(str(self._run_dir.resolve()).encode()).hexdigest()[:16]  # the same after a restart
        self._run = wandb.init(
            project="sdit", name=name, id=identity, resume="allow", dir=str(self._run_dir), mode=mode,
            config=_redacted(self._facts),
            settings=wandb.Settings(
                console="off", disable_git=True, disable_code=True, silent=True, finish_timeout=FINISH_SECONDS
            ),
        )  # fmt: skip
        # W&B drops values that are late for its step counter. A value may be late or be logged again, so the axis is images_seen.
        self._run.define_metric("images_seen")
        self._run.define_metric("*", step_metric="images_seen")

    def on_step(self, clock: Clock, record: StepRecord) -> None:
        if record.logged:
            self._log(clock, dict(scalars(record.as_dict())))

    def on_validation(self, clock: Clock, validation: Validation) -> None:
        self._log(clock, dict(scalars(validation.as_dict())))

    def on_samples(self, clock: Clock, images: np.ndarray, labels: np.ndarray, columns: int) -> None:
        if not self._has_images:
            return
        import wandb

        pixels = grid_pixels(to_pixels(shown_channels(images)), columns)
        self._log(clock, {"samples": wandb.Image(pixels)})

    def _log(self, clock: Clock, values: dict[str, Any]) -> None:
        self._run.log({**values, "images_seen": clock.images_seen})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def scalars(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (name, number) of all numbers in a record. Lists and dicts give `key/index` or `key/name`.

    A key with more than MAX_SERIES numbers is skipped.
    """
    for key, value in metrics.items():
        numbers = list(_flattened(key, value))
        if len(numbers) <= MAX_SERIES:
            yield from numbers


def _flattened(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flattened(f"{name}/{key}", item)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _flattened(f"{name}/{number:02}", item)
    elif isinstance(value, int | float):
        yield name, float(value)


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value
