"""Optional places that a run's numbers and pictures go to; none of them can stop the run."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sdit.config import Config, ObserveConfig
from sdit.data.pixels import to_pixels
from sdit.errors import ConfigError
from sdit.observe.sample_grids import grid_pixels, shown_channels
from sdit.redact import redact
from sdit.train.clock import Clock
from sdit.train.events import Observer

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


class Tolerant(Observer):
    """Passes everything on to `sink`, whose failures are told, not raised: the first is the last, unless it is `lasting`."""

    def __init__(self, sink: Observer, name: str, lasting: bool = False) -> None:
        self._sink, self._name, self._lasting = sink, name, lasting
        self._is_on = True

    def on_start(self, clock: Clock, total_images: int, message: str) -> None:
        self._try(lambda: self._sink.on_start(clock, total_images, message))

    def on_step(self, clock: Clock, metrics: dict[str, Any], logged: bool) -> None:
        self._try(lambda: self._sink.on_step(clock, metrics, logged))

    def on_samples(self, clock: Clock, images: np.ndarray, labels: np.ndarray, columns: int) -> None:
        self._try(lambda: self._sink.on_samples(clock, images, labels, columns))

    def on_routing(self, clock: Clock, probs: np.ndarray, columns: Sequence[int] | None) -> None:
        self._try(lambda: self._sink.on_routing(clock, probs, columns))

    def on_checkpoint(self, clock: Clock, folder: Path, seconds: float) -> None:
        self._try(lambda: self._sink.on_checkpoint(clock, folder, seconds))

    def on_stop(self, clock: Clock) -> None:
        self._try(lambda: self._sink.on_stop(clock))

    def on_rollback(self, clock: Clock, text: str) -> None:
        self._try(lambda: self._sink.on_rollback(clock, text))

    def on_validation(self, clock: Clock, metrics: dict[str, Any]) -> None:
        self._try(lambda: self._sink.on_validation(clock, metrics))

    def missing(self, clock: Clock) -> set[str]:
        found: set[str] = set()
        self._try(lambda: found.update(self._sink.missing(clock)))
        return found

    def on_event(self, clock: Clock, kind: str, text: str) -> None:
        self._try(lambda: self._sink.on_event(clock, kind, text))

    def close(self) -> None:
        self._try(self._sink.close)

    def _try(self, call: Callable[[], None]) -> None:
        if not self._is_on:
            return
        try:
            call()
        except Exception as error:
            self._is_on = self._lasting
            left = "training goes on" if self._lasting else "training goes on without it"
            _log.warning("%s failed (%s: %s); %s", self._name, type(error).__name__, error, left)
            _log.debug("%s", self._name, exc_info=True)


class TensorBoard(Observer):
    """Event files in RUN/tensorboard; the horizontal axis is images seen."""

    def __init__(self, run_dir: Path, has_pictures: bool = True) -> None:
        self._folder, self._has_pictures = run_dir / "tensorboard", has_pictures
        self._writer: Any = None

    def on_start(self, clock: Clock, total_images: int, message: str) -> None:
        from tensorboardX import SummaryWriter  # an optional package

        # What the resumed run writes again is hidden in the older files.
        self._writer = SummaryWriter(str(self._folder), purge_step=clock.images_seen + 1)
        self.on_event(clock, "start", message)

    def on_step(self, clock: Clock, metrics: dict[str, Any], logged: bool) -> None:
        if logged:
            for key, value in scalars(metrics):
                self._writer.add_scalar(key, value, clock.images_seen)

    def on_validation(self, clock: Clock, metrics: dict[str, Any]) -> None:
        self.on_step(clock, metrics, logged=True)

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

    def __init__(self, run_dir: Path, config: Config, has_pictures: bool = True) -> None:
        self._run_dir, self._config, self._has_pictures = run_dir, config, has_pictures
        self._run: Any = None

    def on_start(self, clock: Clock, total_images: int, message: str) -> None:
        import wandb  # an optional package

        mode = self._config.observe.wandb
        if mode == "off":
            return
        name = self._run_dir.resolve().name
        identity = hashlib.sha256(str(self._run_dir.resolve()).encode()).hexdigest()[:16]  # the same after a restart
        self._run = wandb.init(
            project="sdit", name=name, id=identity, resume="allow", dir=str(self._run_dir), mode=mode,
            config=_redacted(self._config.model_dump(mode="json")),
            settings=wandb.Settings(
                console="off", disable_git=True, disable_code=True, silent=True, finish_timeout=FINISH_SECONDS
            ),
        )  # fmt: skip
        # W&B throws away what comes late for a step of its own; a value of an earlier image is made up for, or trained again.
        self._run.define_metric("images_seen")
        self._run.define_metric("*", step_metric="images_seen")

    def on_step(self, clock: Clock, metrics: dict[str, Any], logged: bool) -> None:
        if logged:
            self._log(clock, dict(scalars(metrics)))

    def on_validation(self, clock: Clock, metrics: dict[str, Any]) -> None:
        self.on_step(clock, metrics, logged=True)

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
