"""Images of routing snapshots: one map of six panels, a row of frames over time, and an animation.

This module is imported only when images are drawn, because importing matplotlib takes half a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from sdit.files import replacing
from sdit.observe.routing import (
    Snapshot,
    by_unit,
    evenly,
    gate_entropy,
    path_overlap,
    read_snapshots,
    snapshot_files,
    task_affinity,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CELLS_WITH_NUMBERS = 128  # above this, the numbers in the load map would be too small to read
SHARP_UNITS = 256  # up to this number each unit has its own pixels; above it, the image is smoothed
MAX_BLOCK_TICKS = 14
PATH_COLOURS = {"neither": "#e9ecf0", "prior only": "#f2b134", "path only": "#c8413b", "path and prior": "#2f6690"}
MAP_PIXELS = (1950, 1100)
FRAME_PIXELS = 280  # side of one heat map in a frame
CAPTION_PIXELS = 26
MARGIN_PIXELS = 6
ROW_FRAMES = 6
ANIMATION_FRAMES = 60
FRAME_MILLISECONDS = 250
LAST_FRAME_MILLISECONDS = 2000


def draw_run(folder: Path, report: Callable[[str], None]) -> None:
    """Draw the newest snapshot of RUN/routing as images-N.png, and all snapshots as training.png and training.gif.

    If the newest image exists, nothing is drawn. `report` is called with one line about each unreadable snapshot.
    """
    files = snapshot_files(folder)
    if not files or files[-1].with_suffix(".png").exists():
        return
    snapshots = read_snapshots(evenly(files, ANIMATION_FRAMES), report)
    if snapshots:
        draw_training(snapshots, folder / "training.png", folder / "training.gif")
        newest = snapshots[-1]
        draw_map(newest, folder / f"images-{newest.images_seen:012d}.png", f"after {newest.images_seen:,} images")


def draw_map(snapshot: Snapshot, path: Path, title: str = "") -> None:
    """Write the PNG of six panels atomically."""
    depth, tasks, count = snapshot.probs.shape
    figure = Figure(figsize=(MAP_PIXELS[0] / 100, MAP_PIXELS[1] / 100), dpi=100, layout="constrained")
    axes = figure.subplots(2, 3)
    heading = f"Routes of {tasks} tasks through {depth} blocks, {snapshot.top_k} of {count} experts each"
    figure.suptitle(f"{heading}, {title}" if title else heading, fontsize=15)
    _draw_affinity(axes[0, 0], snapshot.probs)
    _draw_paths(axes[0, 1], snapshot)
    _draw_curves(axes[0, 2], snapshot)
    affinity, overlap = task_affinity(snapshot.probs), path_overlap(snapshot.paths)
    _draw_pairs(axes[1, 0], affinity, "Affinity of two tasks", "cosine of their gate probabilities")
    _draw_pairs(axes[1, 1], overlap, "Overlap of two tasks' paths", "share of common experts")
    _draw_loads(axes[1, 2], snapshot.loads, snapshot.dropped)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def _draw_affinity(axes: Axes, probs: np.ndarray) -> None:
    depth, _, count = probs.shape
    units = by_unit(probs)
    smooth = "antialiased" if units.shape[1] > SHARP_UNITS else "nearest"
    image = _tasks_down(axes, units, cmap="viridis", vmin=0, vmax=float(probs.max()), interpolation=smooth)
    for border in range(1, depth):
        axes.axvline(border * count - 0.5, color="white", linewidth=0.8)
    shown = range(0, depth, -(-depth // MAX_BLOCK_TICKS))
    axes.set_xticks([(block + 0.5) * count - 0.5 for block in shown], [f"{block}" for block in shown])
    axes.set(title="Affinity of tasks and experts", xlabel=f"block ({count} experts each, in order)")
    _colour_bar(axes, image, "gate probability")


def _draw_paths(axes: Axes, snapshot: Snapshot) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    paths = snapshot.paths
    if snapshot.prior is None or snapshot.columns is None:
        order, prior = np.argsort(_mean_tasks(paths), kind="stable"), paths
        axes.set(title="Paths of the tasks", xlabel="expert of any block, by the mean timestep of its tasks")
    else:
        order, prior = np.argsort(snapshot.columns), snapshot.prior
        axes.set(
            title=f"Paths and the diffusion prior: {snapshot.agreement:.1%} of the paths agree",
            xlabel="expert of any block, by its column in the prior",
        )
        patches = [Patch(facecolor=colour, edgecolor="grey", label=word) for word, colour in PATH_COLOURS.items()]
        axes.legend(handles=patches[1:], loc="upper right", framealpha=1)
    colours = ListedColormap(list(PATH_COLOURS.values()))
    _tasks_down(axes, (2 * paths + prior)[:, order], cmap=colours, vmin=-0.5, vmax=3.5, interpolation="nearest")


def _draw_curves(axes: Axes, snapshot: Snapshot) -> None:
    axes.plot(gate_entropy(snapshot.probs), color="#2f6690", label="entropy of the gates over ln M (1: no preference)")
    if snapshot.prior is not None:
        agreement = (snapshot.paths & snapshot.prior).sum(1) / snapshot.paths.sum(1)
        axes.plot(agreement, color="#f2b134", label="share of the path inside the prior's window")
    axes.set(
        title="Gates by timestep", xlabel="timestep (0: least noise)", ylim=(0, 1.02), xlim=(0, len(snapshot.paths) - 1)
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", framealpha=1)


def _draw_pairs(axes: Axes, values: np.ndarray, title: str, label: str) -> None:
    image = axes.imshow(values, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    off_diagonal = (values.sum() - len(values)) / (len(values) * (len(values) - 1))
    axes.set(title=f"{title} (mean {off_diagonal:.2f})", xlabel="timestep", ylabel="timestep")
    _colour_bar(axes, image, label)


def _draw_loads(axes: Axes, loads: np.ndarray, dropped: np.ndarray | None) -> None:
    from matplotlib.ticker import MaxNLocator

    image = axes.imshow(loads, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    if loads.size <= CELLS_WITH_NUMBERS:
        for (block, expert), load in np.ndenumerate(loads):
            colour = "white" if load < 0.5 else "black"
            axes.text(expert, block, f"{load:.2f}", ha="center", va="center", color=colour)
    ratio = float((loads.max(1) / loads.mean(1)).max())
    axes.set(
        title=f"Load of the experts: largest {ratio:.2f} x its block's mean",
        xlabel="expert", ylabel="block",
    )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if dropped is None:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        shown = range(0, len(loads), -(-len(loads) // MAX_BLOCK_TICKS))
        axes.set_yticks(list(shown), [f"{block}: {dropped[block]:.3g}" for block in shown])
        axes.set(ylabel="block: samples dropped per step")
    _colour_bar(axes, image, "expected share of samples that use the expert")


def _tasks_down(axes: Axes, values: np.ndarray, **style: Any) -> Any:
    """Draw (T, units) with one row per task, and return the image."""
    axes.set_ylabel("timestep (0: least noise)")
    return axes.imshow(values, aspect="auto", **style)


def _colour_bar(axes: Axes, image: Any, label: str) -> None:
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=axes, label=label, fraction=0.05, pad=0.02)


def _mean_tasks(paths: np.ndarray) -> np.ndarray:
    """Return (units,), the mean timestep of the tasks that use each unit. It is infinite for unused units."""
    counts = paths.sum(0)
    weighted = np.arange(len(paths)) @ paths
    return np.where(counts > 0, weighted / np.maximum(counts, 1), np.inf)


def heat(values: np.ndarray, colours: str, top: float = 1.0) -> np.ndarray:
    """Return pixels (rows, columns, 3) uint8 of values (rows, columns) from 0 to `top`, in one of matplotlib's colour maps."""
    rgb = matplotlib.colormaps[colours](np.clip(values / top, 0, 1))[..., :3]
    return (rgb * 255).round().astype(np.uint8)


def frame(snapshot: Snapshot, top: float, tall: bool) -> Image.Image:
    """Return an image with two maps: affinity (one row per task) and overlap of the paths.

    They are side by side, or one above the other if `tall`.
    """
    side, step = FRAME_PIXELS, FRAME_PIXELS + MARGIN_PIXELS
    maps = [heat(by_unit(snapshot.probs), "viridis", top), heat(path_overlap(snapshot.paths), "magma")]
    width, height = (step, 2 * step) if tall else (2 * step, step)
    image = Image.new("RGB", (width + MARGIN_PIXELS, height + CAPTION_PIXELS), "white")
    for number, pixels in enumerate(maps):
        across, down = (0, number) if tall else (number, 0)
        corner = (MARGIN_PIXELS + across * step, CAPTION_PIXELS + down * step)
        image.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), corner)
    caption = f"{snapshot.images_seen:,} images"
    if snapshot.agreement is not None:
        caption += f", prior {snapshot.agreement:.0%}"
    font = ImageFont.load_default(15)
    ImageDraw.Draw(image).text((MARGIN_PIXELS, 4), caption, fill="black", font=font)
    return image


def draw_training(snapshots: Sequence[Snapshot], row_path: Path, animation_path: Path) -> None:
    """Write the routes over time, atomically: a PNG with up to ROW_FRAMES frames side by side, and a GIF."""
    top = max(float(snapshot.probs.max()) for snapshot in snapshots)
    columns = [frame(snapshot, top, tall=True) for snapshot in evenly(snapshots, ROW_FRAMES)]
    row = Image.new("RGB", (sum(column.width for column in columns), columns[0].height), "white")
    for number, column in enumerate(columns):
        row.paste(column, (number * column.width, 0))
    with replacing(row_path) as file:
        row.save(file, format="PNG")
    frames = [frame(snapshot, top, tall=False) for snapshot in evenly(snapshots, ANIMATION_FRAMES)]
    times = [FRAME_MILLISECONDS] * (len(frames) - 1) + [LAST_FRAME_MILLISECONDS]
    with replacing(animation_path) as file:
        frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
