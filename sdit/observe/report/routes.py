"""The experts: loads over training, dropped samples, and maps of which task takes which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdit.observe.report.charts import Series, legend, line_chart, picture_chart
from sdit.observe.report.html import Html, card, join, section, tag
from sdit.observe.report.images import file_uri, heat_uri, picture_uri
from sdit.observe.report.numbers import curve, short, ticks
from sdit.observe.report.record import RunRecord
from sdit.observe.report.shared import colour_of, rows, side_by_side
from sdit.observe.routing import Snapshot, path_overlap, task_affinity
from sdit.observe.routing_pictures import MAX_BLOCK_TICKS, evenly

FRAMES = 6
MAX_COLUMNS = 200  # moments of the load map
MAP_BYTES = 400_000
VIRIDIS = "linear-gradient(90deg,#440154,#3b528b,#21918c,#5ec962,#fde725)"
MAGMA = "linear-gradient(90deg,#000004,#51127c,#b73779,#fc8961,#fcfdbf)"
CIVIDIS = "linear-gradient(90deg,#00224e,#434e6c,#7d7c78,#bcae6c,#fee838)"
PATHS = {
    "neither": (233, 236, 240),
    "prior only": (242, 177, 52),
    "path only": (200, 65, 59),
    "path and prior": (47, 102, 144),
}
PATH_LEGEND = [("prior only", "p1"), ("path only", "p2"), ("path and prior", "p3")]
CURVES = (
    ("expert_load_max_over_mean", "Fullest expert", "load / mean of its block"),
    ("rank_work_max_over_mean", "Fullest rank", "work / mean of the ranks"),
    ("dropped_fraction", "Dropped by full experts", "share of the expert uses"),
)
UNITS = "experts, in the order of the blocks"


def routes_section(runs: Sequence[RunRecord]) -> Html:
    """Everything about gates; empty for models without them."""
    gated = [run for run in runs if run.routing or any(_is_table(record.get("expert_load")) for record in run.metrics)]
    if not gated:
        return Html("")
    curves = [card(title, chart) for key, title, label in CURVES if (chart := _over_training(runs, gated, key, label))]
    agreement = _agreement(runs)
    if agreement is not None:
        curves.append(card("Agreement with the diffusion prior", agreement))
    groups = [
        side_by_side(runs, title, draw, among=gated)
        for title, draw in (
            ("Load of the experts over training", _loads),
            ("Dropped by block", _dropped),
            ("Task-expert affinity, now", _affinity),
            ("Paths and the prior, now", _paths),
            ("Task-task affinity, now", lambda run: _pairs(run, affinity=True)),
            ("Overlap of paths, now", lambda run: _pairs(run, affinity=False)),
        )
    ]
    moving = side_by_side(runs, "How the routes moved", _frames, FRAME_NOTE, gated)
    frames = [tag("div", one, class_="grid wide") for one in moving]
    return section("experts", "Experts and routes", *rows(gated, curves, *groups), *frames)


def _over_training(runs: Sequence[RunRecord], gated: Sequence[RunRecord], key: str, label: str) -> Html | None:
    """Curves of the runs with gates, if any of them moves."""
    series = [
        Series(run.name, *curve(run.metrics, key), colour_of(number), plain=True)
        for number, run in enumerate(runs)
        if run in gated
    ]
    moves = any(len(set(one.ys)) > 1 for one in series)
    return line_chart(series, label, from_zero=True) if moves else None


FRAME_NOTE = (
    f"Above: gate probability, timesteps downwards from 0 (least noise), across the {UNITS}. "
    "Below: share of experts that two timesteps have in common."
)


def _agreement(runs: Sequence[RunRecord]) -> Html | None:
    series = []
    for number, run in enumerate(runs):
        points = [(float(shot.images_seen), shot.agreement) for shot in run.routing if shot.agreement is not None]
        xs, ys = [x for x, _ in points], [100 * y for _, y in points]
        series.append(Series(run.name, xs, ys, colour_of(number), plain=True))
    return (
        line_chart(series, "% of the paths", from_zero=True, top=100 / 1.06) if any(one.xs for one in series) else None
    )


def _loads(run: RunRecord) -> Html | None:
    """Load over the block's mean, an expert a row, over images."""
    records = [record for record in run.metrics if _is_table(record.get("expert_load"))]
    shapes = {np.shape(record["expert_load"]) for record in records[-1:]}
    records = evenly([record for record in records if np.shape(record["expert_load"]) in shapes], MAX_COLUMNS)
    if not records:
        return None
    loads = np.array([record["expert_load"] for record in records], dtype=np.float64)  # (moments, depth, M)
    ratio = np.nan_to_num(loads / np.maximum(loads.mean(2, keepdims=True), 1e-9))
    moments, depth, count = ratio.shape
    first, last = float(records[0]["images_seen"]), float(records[-1]["images_seen"])
    shown = [value for value in ticks(first, last, 4) if last > first]
    x_ticks = [((value - first) / (last - first), short(value)) for value in shown]
    top = max(2.0, float(ratio.max()))
    uri = heat_uri(ratio.reshape(moments, -1).T, "cividis", top)
    label = f"load of {depth * count} experts over images seen"
    return picture_chart(
        uri, x_ticks, _block_ticks(depth), "images seen", f"block ({count} experts each)",
        ("0", f"{top:.2g} x mean", CIVIDIS), label=label,
    )  # fmt: skip


def _dropped(run: RunRecord) -> Html | None:
    records = [record for record in run.metrics if isinstance(record.get("dropped_by_block"), list)]
    if not any(any(record["dropped_by_block"]) for record in records):
        return None
    depth = len(records[-1]["dropped_by_block"])
    blocks = evenly(range(depth), 8)
    series = [
        Series(f"block {block}", *curve(records, "dropped_by_block", block), f"c{number}", plain=True)
        for number, block in enumerate(blocks)
    ]
    return line_chart(series, "samples per step", from_zero=True)


def _affinity(run: RunRecord) -> Html | None:
    if not run.routing:
        return _drawn(run)
    shot = run.routing[-1]
    depth, tasks, count = shot.probs.shape
    uri, top = heat_uri(_units(shot), "viridis", float(shot.probs.max())), float(shot.probs.max())
    scale = ("0", f"{top:.2f} gate probability", VIRIDIS)
    return picture_chart(
        uri,
        _block_ticks(depth),
        _task_ticks(tasks),
        f"block ({count} experts each)",
        "timestep (0: least noise)",
        scale,
    )


def _paths(run: RunRecord) -> Html | None:
    """Which experts a task takes, and which the prior wants it to, by the prior's columns."""
    shot = run.routing[-1] if run.routing else None
    if shot is None or shot.prior is None or shot.columns is None:
        return None
    from PIL import Image

    order = np.argsort(shot.columns)
    code = (2 * shot.paths + shot.prior)[:, order]
    colours = np.array(list(PATHS.values()), dtype=np.uint8)
    uri = picture_uri(Image.fromarray(colours[code]))
    drawing = picture_chart(
        uri, [], _task_ticks(len(shot.paths)), "experts, by their column in the prior", "timestep (0: least noise)",
        label="which experts the tasks take, and which the prior wants them to",
    )  # fmt: skip
    return join([drawing, legend(PATH_LEGEND)])


def _pairs(run: RunRecord, affinity: bool) -> Html | None:
    if not run.routing:
        return None
    shot = run.routing[-1]
    values = task_affinity(shot.probs) if affinity else path_overlap(shot.paths)
    step = max(1, -(-len(values) // 250))
    uri = heat_uri(values[:, ::step], "magma")
    marks = _task_ticks(len(values))
    what = "1: the same gates" if affinity else "1: the same path"
    return picture_chart(uri, marks, marks, "timestep", "timestep", ("0", what, MAGMA))


def _frames(run: RunRecord) -> Html | None:
    if len(run.routing) < 2:
        return None
    top = max(float(shot.probs.max()) for shot in run.routing)
    figures = []
    for shot in evenly(run.routing, FRAMES):
        step = max(1, -(-len(shot.paths) // 125))
        overlap = path_overlap(shot.paths)[::step, ::step]
        caption = f"{shot.images_seen:,} images" + ("" if shot.agreement is None else f" · prior {shot.agreement:.0%}")
        pictures = [
            tag("img", src=heat_uri(_units(shot)[::step], "viridis", top), class_="map", alt=f"affinity, {caption}"),
            tag("img", src=heat_uri(overlap, "magma"), class_="map", alt=f"overlap, {caption}"),
        ]
        figures.append(tag("figure", *pictures, tag("figcaption", caption)))
    return tag("div", *figures, class_="frames")


def _drawn(run: RunRecord) -> Html | None:
    """The newest map that was drawn, for a run whose snapshots are gone."""
    uri = file_uri(run.maps[-1], MAP_BYTES) if run.maps else None
    return tag("figure", tag("img", src=uri, alt="routing map")) if uri else None


def _units(shot: Snapshot) -> np.ndarray:
    """(T, units) gate probabilities."""
    return shot.probs.transpose(1, 0, 2).reshape(shot.probs.shape[1], -1)


def _block_ticks(depth: int) -> list[tuple[float, str]]:
    return [((block + 0.5) / depth, f"{block}") for block in range(0, depth, -(-depth // MAX_BLOCK_TICKS))]


def _task_ticks(tasks: int) -> list[tuple[float, str]]:
    return [((value + 0.5) / tasks, f"{value:g}") for value in ticks(0, tasks - 1, 5)]


def _is_table(value: object) -> bool:
    """Whether it is a list of equally long lists of numbers."""
    try:
        return np.asarray(value, dtype=np.float64).ndim == 2
    except (TypeError, ValueError):
        return False
