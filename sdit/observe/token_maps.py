"""Maps of token-routed experts: the load of each expert over timesteps and over the image, counted in one step.

L tokens, M experts of a block. `blocks` are the blocks with such experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdit.files import replacing
from sdit.observe.routing import UNREADABLE

FIELDS = ("by_time", "by_position", "dropped")


@dataclass(frozen=True, eq=False)
class TokenMap:
    """How often the experts of `blocks` were chosen in the step that ended at `images_seen`, before drops, over all ranks.

    `by_time` (blocks, bins, M) int64 counts by equal parts of the time axis, least noise first. `by_position` (blocks, L, M)
    int64 counts by position of the token, row by row of the image. `dropped` (blocks,) int64 are the choices that a full
    expert did not compute.
    """

    images_seen: int
    blocks: Sequence[int]
    by_time: np.ndarray
    by_position: np.ndarray
    dropped: np.ndarray

    @property
    def experts(self) -> int:
        """M."""
        return self.by_time.shape[2]

    @property
    def side(self) -> int:
        """The tokens along one side of the image."""
        return round(self.by_position.shape[1] ** 0.5)

    @property
    def loads(self) -> np.ndarray:
        """(blocks, M), the load of each expert over the mean of its block."""
        return over_mean(self.by_time.sum(1))

    @property
    def dropped_fraction(self) -> np.ndarray:
        """(blocks,), the fraction of the choices that was dropped."""
        return self.dropped / np.maximum(1, self.by_time.sum((1, 2)))

    def save(self, path: Path) -> None:
        """Write a compressed npz atomically. Raises: OSError: if the file cannot be written."""
        arrays = {name: np.asarray(getattr(self, name)).astype(np.int64) for name in FIELDS}
        head = np.array([self.images_seen, *self.blocks], dtype=np.int64)
        with replacing(path) as file:
            np.savez_compressed(file, head=head, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> TokenMap:
        """Read a file that `save` wrote.

        Raises: one of UNREADABLE: if the file is damaged or not a map of token-routed experts.
        """
        with np.load(path, allow_pickle=False) as stored:
            (images_seen, *blocks), arrays = stored["head"].tolist(), [stored[name] for name in FIELDS]
        found = cls(images_seen, blocks, *arrays)
        count, side = len(blocks), found.side if found.by_position.ndim == 3 else 0
        if found.by_time.shape != (count, *found.by_time.shape[1:2], found.by_position.shape[-1]):
            raise ValueError(f"by_time has the shape {found.by_time.shape}")
        if found.by_position.shape != (count, side**2, found.experts) or found.dropped.shape != (count,):
            raise ValueError(f"by_position has the shape {found.by_position.shape}")
        return found


def over_mean(counts: np.ndarray) -> np.ndarray:
    """Return counts (..., M) over their mean over M. It is NaN where nothing was counted."""
    mean = counts.mean(-1, keepdims=True)
    return np.divide(counts, mean, out=np.full(counts.shape, np.nan), where=mean > 0)


def time_rows(found: TokenMap) -> np.ndarray:
    """Return (bins, blocks * M): the load over the mean of its block, one row per part of the time axis."""
    return over_mean(found.by_time).transpose(1, 0, 2).reshape(found.by_time.shape[1], -1)


def position_tiles(found: TokenMap, blocks: Sequence[int]) -> np.ndarray:
    """Return (rows, columns): one image of loads per expert. A row of images is one block of `blocks` (indices into them).

    The images are separated by one row or column of NaN.
    """
    side = found.side
    loads = over_mean(found.by_position[list(blocks)]).reshape(len(blocks), side, side, found.experts)
    padded = np.pad(loads, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=np.nan)
    return padded.transpose(0, 1, 3, 2).reshape(len(blocks) * (side + 1), -1)[:-1, :-1]


def token_map_files(folder: Path) -> list[Path]:
    """Return the maps of a run in RUN/routing, by images seen."""
    return sorted(path for path in folder.glob("tokens-*.npz") if path.is_file())


def read_token_maps(files: Sequence[Path], report: Callable[[str], None]) -> list[TokenMap]:
    """Return the readable maps. `report` is called with one line about each other file."""
    found = []
    for path in files:
        try:
            found.append(TokenMap.load(path))
        except UNREADABLE as error:
            report(f"{path}: not a map of token-routed experts ({type(error).__name__}: {error})")
    return found
