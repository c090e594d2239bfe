"""Everyone that is told of a run."""

from __future__ import annotations

from pathlib import Path

from sdit.config import Config
from sdit.observe.metrics_file import MetricsFile
from sdit.observe.pictures import SampleGrids
from sdit.observe.progress import Progress
from sdit.observe.rank_log import RankLog
from sdit.observe.routing_maps import RoutingMaps
from sdit.observe.sinks import TensorBoard, Tolerant, WeightsAndBiases, require_packages
from sdit.supervise.ranks import RankInfo
from sdit.supervise.run_folder import RunFolder
from sdit.train.events import Observer


def build_observers(
    config: Config, run_dir: Path | RunFolder, info: RankInfo, page: Observer | None = None
) -> list[Observer]:
    """The observers of this rank, in the order in which they are told; `page`: what the node's exporter reads.

    Raises: ConfigError, on every rank, for an optional sink whose package is missing.
    """
    require_packages(config.observe)
    observers: list[Observer] = [RankLog(run_dir, info)]
    if page is not None:
        observers.append(page)
    if info.rank == 0:
        observers += [MetricsFile(run_dir), Progress(), Tolerant(SampleGrids(run_dir), "sample grids", lasting=True)]
        if config.model.variant == "switch":
            observers.append(Tolerant(RoutingMaps(run_dir, config.model), "routing maps", lasting=True))
        if config.observe.tensorboard:
            observers.append(Tolerant(TensorBoard(Path(str(run_dir))), "TensorBoard"))
        if config.observe.wandb != "off":
            observers.append(Tolerant(WeightsAndBiases(Path(str(run_dir)), config), "Weights & Biases"))
    return observers
