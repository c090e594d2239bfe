"""Optional places that a run's numbers and pictures go to; none of them can stop the run."""

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

FINISH_SECONDS = 20.0  # that W&B may take to send the rest: a run that was asked to stop has to leave
MAX_SERIES = 256  # of one key: beyond, nobody finds the curve
_log = logging.getLogger(__name__)


def require_packages(config: ObserveConfig) -> None:
    """Raises: ConfigError naming the pip extra, when a sink is wanted whose package is not installed."""
    wanted = (
        (config.tensorboard, "observe.tensorboard: true", "tensorboardX", "false"),
        (config.wandb != "off", f"observe.wandb: {config.wandb}", "wandb", "off"),
    )
    for is_wanted, key, package, off in wanted:
        if is_wanted and find_spec(package) is None:
            raise ConfigError(f"{key} needs the package {package}: pip install sdit[observe]; legal without it: {off}")


class TensorBoard(Observer):
    """Event files in RUN/tensorboard; the horizontal axis is images seen."""

    name, on_failure = "TensorBoard", OnFailure.DROP

    def __init__(self, run_dir: Path, has_pictures: bool = True) -> None:
        self._folder, self._has_pictures = run_dir / "tensorboard", has_pictures
        self._writer: Any = None

    def on_start(self, clock: Clock, total_images: int, message: str) -> None:
        from tensorboardX import SummaryWriter  # an optional package

        # What the resumed run writes again is hidden in the older files.
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
        if not self._has_pictures:
            return
        pixels = grid_pixels(to_pixels(shown_channels(images)), columns)
        self._writer.add_image("samples", pixels, clock.images_seen, dataformats="HWC" if pixels.ndim == 3 else "HW")

    def on_event(self, clock: Clock, kind: str, text: str) -> None:
        self._writer.add_text(kind, redact(text), clock.images_seen)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases(Observer):
    """A W&B run of the folder's name, over images seen; offline runs lie in RUN/wandb until `wandb sync` sends them."""

    name, on_failure = "Weights & Biases", OnFailure.DROP

    def __init__(
        self, run_dir: Path, config: ObserveConfig, facts: Mapping[str, Any], has_pictures: bool = True
    ) -> None:
        """`facts` is the run's whole config, as W&B shows it."""
        self._run_dir, self._config, self._facts, self._has_pictures = run_dir, config, facts, has_pictures
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
        # W&B throws away what comes late for a step of its own; a value of an earlier image is made up for, or trained again.
        self._run.define_metric("images_seen")
        self._run.define_metric("*", step_metric="images_seen")

    def on_step(self, clock: Clock, record: StepRecord) -> None:
        if record.logged:
            self._log(clock, dict(scalars(record.as_dict())))

    def on_validation(self, clock: Clock, validation: Validation) -> None:
        self._log(clock, dict(scalars(validation.as_dict())))

    def on_samples(self, clock: Clock, images: np.ndarray, labels: np.ndarray, columns: int) -> None:
        if not self._has_pictures:
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
    """(name, number) of everything in a record: lists and dicts give `key/part`, at most MAX_SERIES of a key."""
    for key, value in metrics.items():
        parts = list(_parts(key, value))
        if len(parts) <= MAX_SERIES:
            yield from parts


def _parts(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _parts(f"{name}/{key}", part)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _parts(f"{name}/{number:02}", part)
    elif isinstance(value, int | float):
        yield name, float(value)


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redacted(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_redacted(part) for part in value]
    return redact(value) if isinstance(value, str) else value
