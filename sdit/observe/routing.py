"""Statistics of the routes: affinity, overlap of paths, agreement with the prior, load.

T tasks, M experts of a block, k experts used. A unit is one expert of one block, depth * M of them in block order. The
path of a task is the set of units that it uses.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdit.files import replacing

if TYPE_CHECKING:
    from sdit.model import Assignment

UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


def chosen_experts(probs: np.ndarray, top_k: int) -> np.ndarray:
    """Return the experts (depth, T, k) int64 of highest probability, for probs (depth, T, M)."""
    return np.argsort(-probs, axis=-1, kind="stable")[..., :top_k]


def by_unit(values: np.ndarray) -> np.ndarray:
    """Return values (depth, T, M) as (T, units), one column per unit."""
    return values.transpose(1, 0, 2).reshape(values.shape[1], -1)


def task_paths(probs: np.ndarray, top_k: int) -> np.ndarray:
    """Return (T, depth * M) bool, True where the task uses the unit. Each row has depth * k True values."""
    used = np.zeros(probs.shape, dtype=bool)
    np.put_along_axis(used, chosen_experts(probs, top_k), True, axis=-1)
    return by_unit(used)


def path_overlap(paths: np.ndarray) -> np.ndarray:
    """Return (T, T), the fraction of units that two tasks share, for paths (T, units) bool. It is 1 on the diagonal."""
    counts = paths.astype(np.float32)  # exact, because counts are far below 2^24
    return counts @ counts.T / paths[0].sum()


def task_affinity(probs: np.ndarray) -> np.ndarray:
    """Return (T, T), the cosine between the gate probabilities of two tasks over all units.

    It is 1 on the diagonal. `probs` is (depth, T, M).
    """
    units = by_unit(probs).astype(np.float32)
    units = units / np.linalg.norm(units, axis=1, keepdims=True)
    return units @ units.T


def prior_mask(assignment: Assignment) -> np.ndarray:
    """Return (T, units) bool, True where the prior assigns the unit to the task."""
    return assignment.windows.mask[:, assignment.columns]


def prior_agreement(paths: np.ndarray, assignment: Assignment) -> float:
    """Return the fraction of all tasks' units that are in the prior's window under the assignment. 1 is full agreement."""
    return float((paths & prior_mask(assignment)).sum() / paths.sum())


def gate_entropy(probs: np.ndarray) -> np.ndarray:
    """Return (T,), the entropy of the gates over ln M, averaged over the blocks, for probs (depth, T, M).

    1 means that no expert is preferred.
    """
    if probs.shape[2] == 1:
        return np.zeros(probs.shape[1])
    logs = np.log(np.maximum(probs, 1e-12))
    return -(probs * logs).sum(-1).mean(0) / np.log(probs.shape[2])


@dataclass(frozen=True)
class Snapshot:
    """The gates at one point of the run: `probs` (depth, T, M) and `paths` (T, units) bool.

    `paths` are exact where rounded probs tie. `prior` (T, units) bool and `columns` (units,), the prior's column of each
    unit, are None without a prior. `dropped` (depth,) are the samples that experts at capacity dropped in one step. It is
    None if capacity is not limited. `task_weights` (T,) is T times the probability of each task in training. None: all are
    drawn equally often.
    """

    images_seen: int
    top_k: int
    probs: np.ndarray
    paths: np.ndarray
    prior: np.ndarray | None = None
    columns: np.ndarray | None = None
    dropped: np.ndarray | None = None
    task_weights: np.ndarray | None = None

    @classmethod
    def take(
        cls, images_seen: int, probs: np.ndarray, top_k: int, assignment: Assignment | None,
        dropped: np.ndarray | None = None, task_weights: np.ndarray | None = None,
    ) -> Snapshot:  # fmt: skip
        """Return a snapshot of gate probabilities (depth, T, M)."""
        mask, columns = (None, None) if assignment is None else (prior_mask(assignment), assignment.columns)
        return cls(images_seen, top_k, probs, task_paths(probs, top_k), mask, columns, dropped, task_weights)

    @property
    def loads(self) -> np.ndarray:
        """(depth, M), the expected fraction of samples that use each expert. Each row sums to k."""
        used = self.paths if self.task_weights is None else self.paths * self.task_weights[:, None]
        return used.mean(0).reshape(self.probs.shape[0], -1)

    @property
    def agreement(self) -> float | None:
        """The fraction of the paths that is also in the prior, or None without a prior."""
        return None if self.prior is None else float((self.paths & self.prior).sum() / self.paths.sum())

    def save(self, path: Path) -> None:
        """Write a compressed npz atomically. Probabilities are stored in half precision.

        Raises: OSError: if the file cannot be written.
        """
        depth, _, count = self.probs.shape
        arrays: dict[str, np.ndarray] = {
            "shape": np.array([self.images_seen, self.top_k, depth, count]),
            "probs": self.probs.astype(np.float16),
            "paths": np.packbits(self.paths, axis=1),
        }
        if self.prior is not None and self.columns is not None:
            arrays |= {"prior": np.packbits(self.prior, axis=1), "columns": self.columns}
        if self.dropped is not None:
            arrays["dropped"] = self.dropped
        if self.task_weights is not None:
            arrays["task_weights"] = self.task_weights
        with replacing(path) as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Snapshot:
        """Read a file that `save` wrote.

        Raises: one of UNREADABLE: if the file is damaged or not a snapshot.
        """
        with np.load(path, allow_pickle=False) as stored:
            images_seen, top_k, depth, count = stored["shape"].tolist()
            units = depth * count

            def bits(name: str) -> np.ndarray:
                return np.unpackbits(stored[name], axis=1, count=units).astype(bool)

            has_prior = "prior" in stored
            return cls(
                images_seen, top_k, stored["probs"].astype(np.float32), bits("paths"),
                bits("prior") if has_prior else None, stored.get("columns"), stored.get("dropped"),
                stored.get("task_weights"),
            )  # fmt: skip


def snapshot_files(folder: Path) -> list[Path]:
    """Return the snapshots of a run in RUN/routing, by images seen."""
    return sorted(path for path in folder.glob("images-*.npz") if path.is_file())


def read_snapshots(files: Sequence[Path], report: Callable[[str], None]) -> list[Snapshot]:
    """Return the readable snapshots. `report` is called with one line about each other file."""
    found = []
    for path in files:
        try:
            found.append(Snapshot.load(path))
        except UNREADABLE as error:
            report(f"{path}: not a routing snapshot ({type(error).__name__}: {error})")
    return found


def evenly(items: Sequence[Any], number: int) -> list[Any]:
    """Return at most `number` of the items, evenly spaced, with the first and the last (of one: the first)."""
    count = min(len(items), number)
    if count <= 1:
        return list(items[:count])
    return [items[round(position * (len(items) - 1) / (count - 1))] for position in range(count)]
