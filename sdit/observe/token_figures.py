"""Images of the maps of token-routed experts. This module is imported only when images are drawn (matplotlib)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.figure import Figure

from sdit.files import replacing
from sdit.observe.routing import evenly
from sdit.observe.token_maps import TokenMap, position_tiles, read_token_maps, time_rows, token_map_files

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = "cividis"
EMPTY = "#e9ecf0"  # nothing was counted
LEAST_TOP = 2.0  # the colour scale ends here or higher, so that even loads have the same colour in all maps
TILE_ROWS = 8  # blocks whose experts are shown over the image
MAX_BLOCK_TICKS = 14
MAP_PIXELS = (1950, 900)


def draw_newest(folder: Path, report: Callable[[str], None]) -> None:
    """Draw the newest map of RUN/routing as tokens-N.png, if it was not drawn. `report` gets a line about an unreadable one."""
    files = token_map_files(folder)
    if files and not files[-1].with_suffix(".png").exists():
        for found in read_token_maps(files[-1:], report):
            draw_token_map(found, files[-1].with_suffix(".png"))


def draw_token_map(found: TokenMap, path: Path) -> None:
    """Write the PNG of three panels atomically: loads by block, by timestep, and by position in the image."""
    figure = Figure(figsize=(MAP_PIXELS[0] / 100, MAP_PIXELS[1] / 100), dpi=100, layout="constrained")
    load, time, image = figure.subplots(1, 3, width_ratios=(1, 1.6, 1.6))
    figure.suptitle(
        f"Loads of {found.experts} token-routed experts in {len(found.blocks)} blocks, "
        f"in one step after {found.images_seen:,} images",
        fontsize=15,
    )
    top = scale_top(found)
    _draw(load, found.loads, top, f"Load: largest {np.nanmax(found.loads):.2f} x its block's mean")
    shown = range(0, len(found.blocks), -(-len(found.blocks) // MAX_BLOCK_TICKS))
    load.set_yticks(list(shown), [f"{found.blocks[row]}: {found.dropped_fraction[row]:.1%}" for row in shown])
    load.set(xlabel="expert", ylabel="block: dropped choices")
    _draw(time, time_rows(found), top, "Load by timestep")
    time.set_xticks([(row + 0.5) * found.experts - 0.5 for row in shown], [f"{found.blocks[row]}" for row in shown])
    time.set(xlabel=f"block ({found.experts} experts each)", ylabel="part of the time axis (0: least noise)")
    drawn = _draw_positions(image, found, top)
    figure.colorbar(drawn, ax=[load, time, image], label="load over the mean of its block", fraction=0.03, pad=0.01)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def scale_top(found: TokenMap) -> float:
    """Return the load over the mean at which the colour scale ends."""
    peaks = [np.nanmax(each, initial=0.0) for each in (found.loads, time_rows(found))]
    return max(LEAST_TOP, *map(float, peaks))


def shown_blocks(found: TokenMap) -> list[int]:
    """Return the indices of the blocks whose experts are shown over the image, evenly spaced."""
    return evenly(range(len(found.blocks)), TILE_ROWS)


def _draw_positions(axes: Axes, found: TokenMap, top: float) -> Any:
    rows = shown_blocks(found)
    drawn = _draw(axes, position_tiles(found, rows), top, "Load over the image, one tile per expert", "equal")
    step = found.side + 1
    centre = (found.side - 1) / 2
    axes.set_yticks([row * step + centre for row in range(len(rows))], [f"{found.blocks[row]}" for row in rows])
    columns = range(0, found.experts, -(-found.experts // MAX_BLOCK_TICKS))
    axes.set_xticks([column * step + centre for column in columns], [f"{column}" for column in columns])
    axes.set(xlabel="expert", ylabel="block")
    return drawn


def _draw(axes: Axes, values: np.ndarray, top: float, title: str, aspect: Literal["equal", "auto"] = "auto") -> Any:
    axes.set_facecolor(EMPTY)
    axes.set_title(title)
    return axes.imshow(
        np.ma.masked_invalid(values), cmap=COLOURS, vmin=0, vmax=top, aspect=aspect, interpolation="nearest"
    )  # type: ignore[call-overload]
