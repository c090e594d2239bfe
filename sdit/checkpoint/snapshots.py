"""Snapshots of the power-function averages of a run, and the averages of any width that are reconstructed from them.

A snapshot is a folder in checkpoint format 1 that holds averages only, in RUN/ema. Notation of the source: gamma exponents,
t times in images. Source: Karras et al. 2024 (EDM2), section 3.2 and appendix C.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdit.checkpoint.find import Found, find_checkpoint, list_aside, list_checkpoints
from sdit.checkpoint.load import stored_config
from sdit.checkpoint.shard_set import ShardSet
from sdit.checkpoint.store import CheckpointStore
from sdit.clock import gamma_of
from sdit.config import CheckpointConfig
from sdit.distributed.comm import Comm
from sdit.errors import CheckpointError, ConfigError
from sdit.supervise.run_folder import RunFolder

SUBFOLDER = "ema"


class SnapshotStore(CheckpointStore):
    """The snapshots of one run. None of them is removed to free space."""

    subfolder = SUBFOLDER

    def __init__(self, folder: RunFolder, comm: Comm, config: CheckpointConfig) -> None:
        super().__init__(folder.path / SUBFOLDER, CheckpointConfig(files=config.files), comm, folder)

    def _free_space(self) -> None:
        """Remove nothing: a snapshot cannot be made again."""

    def _prune(self) -> None:
        """Keep all snapshots. Remove those that were set aside: the run has begun to make them again."""
        for aside in list_aside(self.folder):
            shutil.rmtree(aside, ignore_errors=True)


@dataclass(frozen=True)
class StoredAverage:
    """A power-function average in a snapshot or checkpoint: its kind there, its exponent, and images seen."""

    found: Found
    kind: str
    gamma: float
    images: int


def find_averages(run: Path) -> list[StoredAverage]:
    """Return the power-function averages of a run's snapshots and of its newest checkpoint, by images and width.

    Raises: CheckpointError: if there are none, or a snapshot is damaged.
    """
    checkpoint = find_checkpoint(run)
    newest = checkpoint.manifest["clock"]["images_seen"]
    stored = [find_checkpoint(folder) for folder in reversed(list_checkpoints(run / SUBFOLDER))]
    known = {found.manifest["clock"]["images_seen"] for found in stored}
    if newest not in known:
        stored.append(checkpoint)
    averages = [average for found in stored for average in _averages_of(found)]
    if not averages:
        raise CheckpointError(f"{run}: holds no power-function averages; legal: a run with ema.sigma_rel")
    return sorted(averages, key=lambda average: (average.images, -average.gamma))


def _averages_of(found: Found) -> list[StoredAverage]:
    widths = stored_config(found.manifest["config"], str(found.folder)).ema.widths
    images = found.manifest["clock"]["images_seen"]
    with ShardSet(found.folder, found.manifest) as shards:
        kinds = shards.kinds
        return [StoredAverage(found, kind, gamma_of(width), images) for kind, width in widths.items() if kind in kinds]


def choose_coefficients(
    averages: Sequence[StoredAverage], sigma_rel: float, images: int
) -> list[tuple[StoredAverage, float]]:
    """Return the averages that reconstruct the wanted one, with their coefficients, which may be negative.

    Raises: ConfigError: if no average is from `images` or before.
    """
    used = [average for average in averages if average.images <= images]
    if not used:
        first = averages[0].images
        raise ConfigError(f"--images: {images} is before the first stored average; legal: {first} or more")
    times = np.array([average.images for average in used], dtype=np.float64)
    gammas = np.array([average.gamma for average in used])
    wanted = np.array([float(images)]), np.array([gamma_of(sigma_rel)])
    return list(zip(used, solve_coefficients(times, gammas, *wanted)[:, 0].tolist(), strict=True))


def solve_coefficients(
    times: np.ndarray, gammas: np.ndarray, wanted_times: np.ndarray, wanted_gammas: np.ndarray
) -> np.ndarray:
    """Return the coefficients X (n, m) with which n averages approximate m wanted ones best, in float64. Columns sum to 1.

    Source: EDM2, algorithm 3.
    """
    a = _products(times[:, None], gammas[:, None], times, gammas)
    b = _products(times[:, None], gammas[:, None], wanted_times, wanted_gammas)
    x = np.linalg.solve(a, b)
    return x / x.sum(axis=0)


def _products(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Return the inner products of the profiles (t_a, gamma_a) and (t_b, gamma_b), broadcast. Source: EDM2, eq. 151."""
    t_ratio, exponent = t_a / t_b, np.where(t_a < t_b, gamma_b, -gamma_a)
    numerator = (gamma_a + 1) * (gamma_b + 1) * t_ratio**exponent
    return numerator / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))
