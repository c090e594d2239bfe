"""The observers of a run."""

from __future__ import annotations

import logging
from pathlib import Path

from sdit.clock import Clock
from sdit.config import Config
from sdit.launch_environment import RankInfo
from sdit.observe.metrics_file import MetricsFile
from sdit.observe.progress import Progress
from sdit.observe.rank_log import RankLog
from sdit.observe.routing_maps import RoutingMaps
from sdit.observe.sample_grids import SampleGrids
from sdit.observe.sinks import TensorBoard, WeightsAndBiases, require_packages
from sdit.supervise.heartbeat import FOLDER_MOVED, Heartbeat
from sdit.supervise.run_folder import RunFolder
from sdit.train.decode import draws_latents
from sdit.train.events import Observer, Observers
from sdit.train.record import StepRecord

_log = logging.getLogger(__name__)


class FolderWatch(Observer):
    """Requests a stop after the step in which the run folder is no longer at its path.

    Raises: ConfigError: if the folder was deleted.
    """

    def __init__(self, folder: RunFolder, heartbeat: Heartbeat) -> None:
        self._folder, self._heartbeat = folder, heartbeat

    def on_step(self, clock: Clock, record: StepRecord) -> None:
        now = self._folder.now
        if now is None:
            self._folder.check()
        elif now != self._folder.path:
            self._heartbeat.request_stop(FOLDER_MOVED)


def build_observers(
    config: Config,
    run_dir: Path | RunFolder,
    info: RankInfo,
    metrics: Observer | None = None,
    heartbeat: Heartbeat | None = None,
) -> Observers:
    """Return the observers of this rank in the order of their calls.

    `metrics` writes the shared metrics file that the node's exporter reads. `heartbeat` requests a stop if the folder is moved.

    Raises: ConfigError: on all ranks, if the package of an optional sink is missing.
    """
    require_packages(config.observe)
    shows_images = bool(config.sample.vae) or not draws_latents(config)
    observers: list[Observer] = [RankLog(run_dir, info)]
    if metrics is not None:
        observers.append(metrics)
    if info.rank == 0:
        if not shows_images:
            _log.warning(
                "sample.vae: is not set; the model samples latents, written to samples/latents-N.npz; no images"
            )
        observers += [MetricsFile(run_dir), Progress(), SampleGrids.of(config, run_dir, shows_images)]
        if config.model.variant == "switch" or config.model.moe is not None:
            observers.append(RoutingMaps.of(config, run_dir))
        if config.observe.tensorboard:
            observers.append(TensorBoard(Path(str(run_dir)), shows_images))
        if config.observe.wandb != "off":
            facts = config.model_dump(mode="json")
            observers.append(WeightsAndBiases(Path(str(run_dir)), config.observe, facts, shows_images))
    if heartbeat is not None and isinstance(run_dir, RunFolder):
        observers.append(FolderWatch(run_dir, heartbeat))
    return Observers(observers, info.rank == 0)
