"""The report's section on experts: loads over training, dropped samples, and maps of tasks and experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdit.observe.routing import by_unit, evenly, path_overlap, task_affinity
from sdit.observe.routing_figures import PATH_COLOURS, heat
from sdit.report.elements import Card, Chart, Element, Frames, Grid, Section, colour_of, rows, side_by_side
from sdit.report.figures import Series, curve_cards, heat_map, line_chart
from sdit.report.images import file_uri, pixels_uri
from sdit.report.record import RunRecord
from sdit.report.values import curve

FRAMES = 6
MAX_COLUMNS = 200  # logged steps in the load map
MAX_ROWS = 250  # of a heat map; more are not visible at its size
MAP_BYTES = 400_000
TIMESTEP = "timestep (0: least noise)"
CURVES = (
    ("expert_load_max_over_mean", "Most loaded expert", "load / mean of its block"),
    ("rank_work_max_over_mean", "Most loaded rank", "work / mean of the ranks"),
    ("dropped_fraction", "Dropped samples", "fraction of (sample, expert) pairs"),
)
FRAME_NOTE = (
    "Above: gate probability. Rows are timesteps from 0 (least noise), columns are experts in the order of the blocks. "
    "Below: fraction of experts that two timesteps share."
)


def experts_section(runs: Sequence[RunRecord]) -> Section:
    """Return the section on experts. It is empty for models without gates."""
    gated = [run for run in runs if run.routing or any(is_table(record.get("expert_load")) for record in run.metrics)]
    curves = curve_cards(runs, CURVES, constant=False) if gated else []
    if (agreement := _agreement(runs)) is not None:
        curves.append(Card("Agreement with the diffusion prior", [agreement]))
    groups = [
        side_by_side(runs, title, draw, among=gated)
        for title, draw in (
            ("Load of the experts over training", lambda run: load_map(run, "expert_load")),
            ("Dropped by block", _dropped),
            ("Task-expert affinity, now", _affinity),
            ("Paths and the prior, now", _paths),
            ("Task-task affinity, now", lambda run: _pairs(run, affinity=True)),
            ("Overlap of paths, now", lambda run: _pairs(run, affinity=False)),
        )
    ]
    moving = side_by_side(runs, "Routes over training", _frames, FRAME_NOTE, gated)
    grids = [*rows(gated, curves, *groups), *(Grid([card], "wide") for card in moving)]
    return Section("experts", "Experts", "Experts and routes", grids)


def _agreement(runs: Sequence[RunRecord]) -> Element | None:
    series = []
    for number, run in enumerate(runs):
        points = [(float(shot.images_seen), 100 * shot.agreement) for shot in run.routing if shot.agreement is not None]
        series.append(Series(run.name, [x for x, _ in points], [y for _, y in points], colour_of(number)))
    return line_chart(series, "% of the paths", top=100.0) if any(one.xs for one in series) else None


def load_map(run: RunRecord, key: str, every: int = 1) -> Element | None:
    """Return the load over the mean of the block, with one row per expert, over images.

    `key` of metrics.jsonl holds a table with one row for each block, or for the last one of every `every` blocks.
    """
    records = [record for record in run.metrics if is_table(record.get(key))]
    shapes = {np.shape(record[key]) for record in records[-1:]}
    records = evenly([record for record in records if np.shape(record[key]) in shapes], MAX_COLUMNS)
    if not records:
        return None
    loads = np.array([record[key] for record in records], dtype=np.float64)  # (moments, blocks, M)
    ratio = np.nan_to_num(loads / np.maximum(loads.mean(2, keepdims=True), 1e-9))
    moments, blocks, count = ratio.shape
    first, last = float(records[0]["images_seen"]), float(records[-1]["images_seen"])
    top = max(2.0, float(ratio.max()))
    rgb = heat(ratio.reshape(moments, -1).T[:: _stride(blocks * count)], "cividis", top)
    images = (first, last) if last > first else None
    scale = ("0", "cividis", f"{top:.2g} x mean")
    edges = (every / 2 - 1, (blocks + 0.5) * every - 1)
    return heat_map(rgb, "images seen", f"block ({count} experts each)", images, edges, scale)


def _dropped(run: RunRecord) -> Element | None:
    records = [record for record in run.metrics if isinstance(record.get("dropped_by_block"), list)]
    if not any(any(record["dropped_by_block"]) for record in records):
        return None
    series = [
        Series(f"block {block}", *curve(records, "dropped_by_block", block), f"c{number}")
        for number, block in enumerate(evenly(range(len(records[-1]["dropped_by_block"])), 8))
    ]
    return line_chart(series, "samples per step")


def _affinity(run: RunRecord) -> Element | None:
    if not run.routing:
        return _drawn(run)
    shot = run.routing[-1]
    depth, tasks, count = shot.probs.shape
    top = float(shot.probs.max())
    rgb = heat(by_unit(shot.probs)[:: _stride(tasks)], "viridis", top)
    scale = ("0", "viridis", f"{top:.2f} gate probability")
    return heat_map(rgb, f"block ({count} experts each)", TIMESTEP, _centres(depth), _centres(tasks), scale)


def _paths(run: RunRecord) -> Element | None:
    """Return the experts that a task uses and those that the prior assigns to it, ordered by the prior's columns."""
    shot = run.routing[-1] if run.routing else None
    if shot is None or shot.prior is None or shot.columns is None:
        return None
    code = (2 * shot.paths + shot.prior)[:, np.argsort(shot.columns)]
    palette = np.array(
        [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in PATH_COLOURS.values()], np.uint8
    )
    columns = "experts, by their column in the prior"
    chart = heat_map(palette[code[:: _stride(len(code))]], columns, TIMESTEP, None, _centres(len(code)))
    return Chart(chart.svg, [("prior only", "p1"), ("path only", "p2"), ("path and prior", "p3")])


def _pairs(run: RunRecord, affinity: bool) -> Element | None:
    if not run.routing:
        return None
    shot = run.routing[-1]
    values = task_affinity(shot.probs) if affinity else path_overlap(shot.paths)
    step, tasks = _stride(len(values)), _centres(len(values))
    scale = ("0", "magma", "1: the same gates" if affinity else "1: the same path")
    return heat_map(heat(values[::step, ::step], "magma"), "timestep", "timestep", tasks, tasks, scale)


def _frames(run: RunRecord) -> Element | None:
    if len(run.routing) < 2:
        return None
    top = max(float(shot.probs.max()) for shot in run.routing)
    frames = []
    for shot in evenly(run.routing, FRAMES):
        step = _stride(len(shot.paths), MAX_ROWS // 2)
        overlap = path_overlap(shot.paths)[::step, ::step]
        caption = f"{shot.images_seen:,} images" + ("" if shot.agreement is None else f" · prior {shot.agreement:.0%}")
        affinity = pixels_uri(heat(by_unit(shot.probs)[::step], "viridis", top))
        images = [(affinity, f"affinity, {caption}"), (pixels_uri(heat(overlap, "magma")), f"overlap, {caption}")]
        frames.append((caption, images))
    return Frames(frames, "map")


def _drawn(run: RunRecord) -> Element | None:
    """Return the newest map that an older version drew, for a run without arrays."""
    uri = file_uri(run.maps[-1], MAP_BYTES) if run.maps else None
    return Frames([("", [(uri, "routing map")])]) if uri else None


def _stride(count: int, most: int = MAX_ROWS) -> int:
    return max(1, -(-count // most))


def _centres(count: int) -> tuple[float, float]:
    """Return the range of an axis on which the centre of each of `count` equal cells is its index."""
    return -0.5, count - 0.5


def is_table(value: object) -> bool:
    """Return True for a list of lists of numbers with equal lengths."""
    try:
        return np.asarray(value, dtype=np.float64).ndim == 2
    except (TypeError, ValueError):
        return False
