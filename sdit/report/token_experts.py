"""The report's section on token-routed experts: loads, drops and entropy over training, and maps over timestep and image.

M experts of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sdit.observe.routing import evenly
from sdit.observe.routing_figures import heat
from sdit.observe.token_figures import COLOURS, scale_top, shown_blocks
from sdit.observe.token_maps import TokenMap, position_tiles, time_rows
from sdit.report.elements import Element, Frames, Grid, Section, rows, side_by_side
from sdit.report.experts import is_table, load_map
from sdit.report.figures import curve_cards, heat_map
from sdit.report.images import pixels_uri
from sdit.report.record import RunRecord

FRAMES = 6
NOTHING = (206, 212, 219)  # nothing was counted
CURVES = (
    ("token_load_max_over_mean", "Most loaded token-routed expert", "choices / mean of its block"),
    ("router_entropy", "Router entropy", "nats, mean over blocks"),
    ("token_dropped_fraction", "Dropped tokens", "fraction of (token, expert) pairs"),
    ("aux_loss", "Balance loss", "with its weight"),
)
MAP_NOTE = "One step. The colour is the number of choices over the mean of the block, before drops."
TIME_NOTE = f"{MAP_NOTE} Rows without samples are grey."
FRAME_NOTE = (
    "Above: rows are timesteps from the least noise, columns are experts in the order of the blocks. "
    "Below: one image per expert. A row of images is a block."
)


def token_experts_section(runs: Sequence[RunRecord]) -> Section:
    """Return the section on token-routed experts. It is empty for models without them."""
    routed = [
        run for run in runs if run.token_maps or any(is_table(record.get("token_load")) for record in run.metrics)
    ]
    curves = curve_cards(runs, CURVES, constant=False) if routed else []
    groups = [
        side_by_side(runs, "Load of token-routed experts over training", _loads, among=routed),
        side_by_side(runs, "Load by timestep, now", lambda run: _newest(run, _times), TIME_NOTE, routed),
        side_by_side(runs, "Load over the image, now", lambda run: _newest(run, _positions), MAP_NOTE, routed),
    ]
    moving = side_by_side(runs, "Loads by timestep and over the image", _frames, FRAME_NOTE, routed)
    grids = [*rows(routed, curves, *groups), *(Grid([card], "wide") for card in moving)]
    return Section("token-experts", "Token experts", "Token-routed experts", grids)


def _loads(run: RunRecord) -> Element | None:
    every = run.config.get("model.moe.every")
    return load_map(run, "token_load", every if isinstance(every, int) and every > 0 else 1)


def _newest(run: RunRecord, draw: Callable[[TokenMap], Element]) -> Element | None:
    return draw(run.token_maps[-1]) if run.token_maps else None


def _times(found: TokenMap) -> Element:
    columns = f"block ({found.experts} experts each)"
    x_range = _range(found.blocks)
    return heat_map(
        _pixels(time_rows(found), scale_top(found)), columns, "timestep (0: least noise)", x_range,
        (0.0, 1.0), _scale(found),
    )  # fmt: skip


def _positions(found: TokenMap) -> Element:
    shown = shown_blocks(found)
    y_range = _range([found.blocks[row] for row in shown])
    experts = (-0.5, found.experts - 0.5)
    return heat_map(_tiles(found, scale_top(found)), "expert", "block", experts, y_range, _scale(found))


def _frames(run: RunRecord) -> Element | None:
    if len(run.token_maps) < 2:
        return None
    top = max(map(scale_top, run.token_maps))
    frames = []
    for found in evenly(run.token_maps, FRAMES):
        caption = f"{found.images_seen:,} images"
        images = [
            (pixels_uri(_pixels(time_rows(found), top)), f"load by timestep, {caption}"),
            (pixels_uri(_tiles(found, top)), f"load over the image, {caption}"),
        ]
        frames.append((caption, images))
    return Frames(frames, "map")


def _tiles(found: TokenMap, top: float) -> np.ndarray:
    return _pixels(position_tiles(found, shown_blocks(found)), top)


def _pixels(loads: np.ndarray, top: float) -> np.ndarray:
    """Return pixels (rows, columns, 3) uint8 of loads over the mean, grey where they are unknown."""
    rgb = heat(np.nan_to_num(loads), COLOURS, top)
    rgb[np.isnan(loads)] = NOTHING
    return rgb


def _scale(found: TokenMap) -> tuple[str, str, str]:
    return "0", COLOURS, f"{scale_top(found):.2g} x mean"


def _range(blocks: Sequence[int]) -> tuple[float, float]:
    """Return the range of an axis with equal cells on which the centres of the first and the last cell are these blocks."""
    half = (blocks[-1] - blocks[0]) / (len(blocks) - 1) / 2 if len(blocks) > 1 else 0.5
    return blocks[0] - half, blocks[-1] + half
