"""Which experts the tasks take: affinity, overlap of paths, agreement with the prior, load. T tasks, M experts, k used.

A unit is one expert of one block, depth * M of them in block order; the path of a task is the set of units it uses.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdit.model import Assignment
from sdit.model.moe.routes import exact_loads

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CELLS_WITH_NUMBERS = 128  # beyond, numbers in the load map could not be read
SHARP_UNITS = 256  # up to here each unit has pixels of its own; smoothing would blur it, and beyond it is needed
MAX_BLOCK_TICKS = 14
PATH_COLOURS = {"neither": "#ffffff", "prior only": "#f2b134", "path only": "#c8413b", "path and prior": "#2f6690"}


def chosen_experts(probs: np.ndarray, top_k: int) -> np.ndarray:
    """(depth, T, k) int64 experts of highest probability; probs (depth, T, M)."""
    return np.argsort(-probs, axis=-1, kind="stable")[..., :top_k]


def task_paths(probs: np.ndarray, top_k: int) -> np.ndarray:
    """(T, depth * M) bool, true where the task uses the unit; each row holds depth * k."""
    used = np.zeros(probs.shape, dtype=bool)
    np.put_along_axis(used, chosen_experts(probs, top_k), True, axis=-1)
    return used.transpose(1, 0, 2).reshape(probs.shape[1], -1)


def path_overlap(paths: np.ndarray) -> np.ndarray:
    """(T, T) share of the units that two tasks have in common; 1 on the diagonal. paths: (T, units) bool."""
    counts = paths.astype(np.float32)  # exact: counts stay far below 2^24
    return counts @ counts.T / paths[0].sum()


def prior_agreement(paths: np.ndarray, assignment: Assignment) -> float:
    """Share of all tasks' units that lie in the prior's window under the assignment; 1: the prior is followed."""
    return float((paths & assignment.windows.mask[:, assignment.columns]).sum() / paths.sum())


def routing_map(probs: np.ndarray, top_k: int, assignment: Assignment | None, path: Path, title: str = "") -> None:
    """Write one PNG of four maps for gate probabilities (depth, T, M) of all tasks."""
    from matplotlib.figure import Figure  # half a second to import, and rarely needed

    depth, tasks, count = probs.shape
    paths, loads = task_paths(probs, top_k), exact_loads(chosen_experts(probs, top_k), count)
    figure = Figure(figsize=(15, 11), dpi=100, layout="constrained")
    axes = figure.subplots(2, 2)
    heading = f"Routes of {tasks} tasks through {depth} blocks, {top_k} of {count} experts each"
    figure.suptitle(f"{heading}, {title}" if title else heading, fontsize=15)
    _draw_affinity(axes[0, 0], probs)
    _draw_paths(axes[0, 1], paths, assignment)
    _draw_overlap(axes[1, 0], path_overlap(paths))
    _draw_loads(axes[1, 1], loads)
    figure.savefig(path, format="png")


def _draw_affinity(axes: Axes, probs: np.ndarray) -> None:
    depth, tasks, count = probs.shape
    units = probs.transpose(1, 0, 2).reshape(tasks, -1)
    smooth = "antialiased" if units.shape[1] > SHARP_UNITS else "nearest"
    image = _tasks_down(axes, units, cmap="viridis", vmin=0, vmax=float(probs.max()), interpolation=smooth)
    for border in range(1, depth):
        axes.axvline(border * count - 0.5, color="white", linewidth=0.8)
    shown = range(0, depth, -(-depth // MAX_BLOCK_TICKS))
    axes.set_xticks([(block + 0.5) * count - 0.5 for block in shown], [f"{block}" for block in shown])
    axes.set(title="Affinity of tasks and experts", xlabel=f"block ({count} experts each, in order)")
    _colour_bar(axes, image, "gate probability")


def _draw_paths(axes: Axes, paths: np.ndarray, assignment: Assignment | None) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    if assignment is None:
        order, prior = np.argsort(_mean_tasks(paths), kind="stable"), paths
        axes.set(title="Paths of the tasks", xlabel="expert of any block, by the mean timestep of its tasks")
    else:
        order, prior = np.argsort(assignment.columns), assignment.windows.mask[:, assignment.columns]
        agreement = prior_agreement(paths, assignment)
        axes.set(
            title=f"Paths and the diffusion prior: {agreement:.1%} of the paths agree",
            xlabel="expert of any block, by its column in the prior",
        )
        patches = [Patch(facecolor=colour, edgecolor="grey", label=word) for word, colour in PATH_COLOURS.items()]
        axes.legend(handles=patches[1:], loc="upper right", framealpha=1)
    colours = ListedColormap(list(PATH_COLOURS.values()))
    _tasks_down(axes, (2 * paths + prior)[:, order], cmap=colours, vmin=-0.5, vmax=3.5, interpolation="nearest")


def _draw_overlap(axes: Axes, overlap: np.ndarray) -> None:
    image = axes.imshow(overlap, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    off_diagonal = (overlap.sum() - len(overlap)) / (len(overlap) * (len(overlap) - 1))
    axes.set(title=f"Overlap of two tasks' paths (mean {off_diagonal:.2f})", xlabel="timestep", ylabel="timestep")
    _colour_bar(axes, image, "share of common experts")


def _draw_loads(axes: Axes, loads: np.ndarray) -> None:
    from matplotlib.ticker import MaxNLocator

    image = axes.imshow(loads, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    if loads.size <= CELLS_WITH_NUMBERS:
        for (block, expert), load in np.ndenumerate(loads):
            colour = "white" if load < 0.5 else "black"
            axes.text(expert, block, f"{load:.2f}", ha="center", va="center", color=colour)
    ratio = float((loads.max(1) / loads.mean(1)).max())
    axes.set(
        title=f"Load of the experts (mean {loads.mean():.2f}, fullest {ratio:.2f} x the mean of its block)",
        xlabel="expert", ylabel="block",
    )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _colour_bar(axes, image, "share of the tasks that use the expert")


def _tasks_down(axes: Axes, values: np.ndarray, **style: Any) -> Any:
    """Draw (T, units) with the tasks downwards; return the image."""
    axes.set_ylabel("timestep (0: least noise)")
    return axes.imshow(values, aspect="auto", **style)


def _colour_bar(axes: Axes, image: Any, label: str) -> None:
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=axes, label=label, fraction=0.05, pad=0.02)


def _mean_tasks(paths: np.ndarray) -> np.ndarray:
    """(units,) mean timestep of the tasks that use each unit; unused ones come last."""
    counts = paths.sum(0)
    weighted = np.arange(len(paths)) @ paths
    return np.where(counts > 0, weighted / np.maximum(counts, 1), np.inf)
