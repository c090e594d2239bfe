"""Draws what RUN/routing lacks, as a process of low priority beside the training: python -m sdit.observe.routing_drawer FOLDER

The folder is the queue: every snapshot images-N.npz gets a picture images-N.png, and training.png and training.gif show
all of them. A drawer that was killed leaves nothing that the next one does not make up for.
"""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from sdit.observe.routing import Snapshot

UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


def snapshot_files(folder: Path) -> list[Path]:
    """The snapshots of a run, by images seen."""
    return sorted(path for path in folder.glob("images-*.npz") if path.is_file())


def undrawn(folder: Path) -> list[Path]:
    """The snapshots that have no picture yet, or an older one."""
    return [path for path in snapshot_files(folder) if _age(path.with_suffix(".png")) < _age(path)]


def read_snapshots(files: list[Path], tell: Callable[[str], None]) -> list[Snapshot]:
    """Those that can be read; the others are told by name."""
    found = []
    for path in files:
        try:
            found.append(Snapshot.load(path))
        except UNREADABLE as error:
            tell(f"{path}: no routing snapshot ({type(error).__name__}: {error})")
    return found


def draw_all(folder: Path) -> None:
    """Draw until nothing is left to draw, or the process that asked for it is gone."""
    from sdit.observe.routing_pictures import ANIMATION_FRAMES, draw_map, draw_training, evenly

    parent, spoilt = os.getppid(), set[Path]()
    while waiting := [path for path in undrawn(folder) if path not in spoilt]:
        for path in waiting:
            if os.getppid() != parent:
                return
            snapshots = read_snapshots([path], lambda text: print(text, file=sys.stderr))
            if not snapshots:
                spoilt.add(path)
                continue
            picture = path.with_suffix(".png")
            draw_map(snapshots[0], _partial(picture), f"after {snapshots[0].images_seen:,} images")
            os.replace(_partial(picture), picture)
        files = evenly([path for path in snapshot_files(folder) if path not in spoilt], ANIMATION_FRAMES)
        shown = read_snapshots(files, lambda _: None)
        if shown:
            row, animation = folder / "training.png", folder / "training.gif"
            draw_training(shown, _partial(row), _partial(animation))
            os.replace(_partial(row), row)
            os.replace(_partial(animation), animation)


def _partial(path: Path) -> Path:
    """The hidden name a file has while it is written."""
    return path.with_name(f".partial-{path.name}")


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


if __name__ == "__main__":
    os.nice(19)
    draw_all(Path(sys.argv[1]))
