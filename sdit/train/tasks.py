"""The periodic tasks of a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdit.checkpoint.find import Found
from sdit.checkpoint.snapshots import SnapshotStore
from sdit.data.loader import Loader
from sdit.supervise.run_folder import RunFolder
from sdit.train.checkpoints import Checkpoints, Snapshots
from sdit.train.context import TrainContext
from sdit.train.decode import latent_decoder
from sdit.train.sampling import GridSampler, RoutingMaps
from sdit.train.validation import Validator


@dataclass(frozen=True)
class PeriodicTasks:
    """What a run does between two steps. Each task says itself when it is due."""

    validator: Validator
    snapshots: Snapshots
    checkpoints: Checkpoints
    routing: RoutingMaps
    sampler: GridSampler


def build_tasks(
    context: TrainContext, held_out: Loader | None, labels: np.ndarray, found: Found | None, folder: RunFolder
) -> PeriodicTasks:
    """Return the periodic tasks of a run. Raises: ConfigError for a sample.vae that does not fit."""
    config = context.run.config
    decoder = latent_decoder(config, context.state.data.training, None, context.comm.device)
    sampler = GridSampler(context, config.sample, labels, decoder)
    started_from = None if found is None else found.folder
    return PeriodicTasks(
        Validator(context, config.validation, held_out),
        Snapshots(context, config.ema, SnapshotStore(folder, context.comm, config.checkpoint)),
        Checkpoints(context, config.checkpoint, config.train.rollbacks, started_from),
        RoutingMaps(context, sampler, config.observe.routing_every_images),
        sampler,
    )
