"""The tables of the page, one per recipe. A cell is mean ± standard deviation over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.bootstrap import NOT_REACHED, Interval, images_to_reach, interval
from experiments.results import (
    Measure,
    Results,
    Run,
    error_bins,
    fid,
    fid_curve,
    final,
    held_out_loss,
    images_seen,
    loss_curve,
)

TIME_PARTS = 5  # equal parts of the time axis in the table of errors by time
NONE = "-"
Curve = Callable[[Run], list[tuple[int, float]]]
Points = dict[int, np.ndarray]  # images seen -> (B,) values


def spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Mean ± standard deviation of the sample; a single value has no deviation."""
    if not values:
        return NONE
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else f"{mean} (1 seed)"


def table(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table of rows by column; a column in which no row has anything is left out."""
    if not rows:
        return "No run is finished."
    columns = [column for column in rows[0] if any(row[column] != NONE for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cost_table(results: Results) -> str:
    """What each model costs."""
    rows = []
    for variant, seeds in results.runs.items():
        run = next(iter(seeds.values()))
        rows.append({
            "model": results.label(variant), "parameters, M": f"{run['cost']['parameters'] / 1e6:.2f}",
            "MFLOP / image": f"{run['cost']['flops_per_image'] / 1e6:.0f}", "images": f"{images_seen(run):,}",
            "ms / image": spread(results.values(variant, results.milliseconds), 2),
            "time / DiT's": spread(results.relative_time(variant), 3),
        })  # fmt: skip
    return table(rows)


def results_table(results: Results) -> str:
    """Held-out loss and scores of samples at the end of the runs, and paired differences to the baseline."""
    rows = []
    for variant in results.runs:
        row = {"model": results.label(variant), "time / DiT's": spread(results.relative_time(variant), 3)}
        for name, measure, digits in (("held-out loss", held_out_loss, 4), ("FID", fid, 1)):
            row |= {name: spread(results.values(variant, measure), digits)}
            row |= {f"{name} less DiT's": difference(results, variant, measure, digits)}
        rows.append(row | _shares(results, variant))
    return table(rows)


def guided_table(results: Results) -> str:
    """The scores of samples with guidance."""
    names = {name: results.label(name) for name in results.runs}
    fids = {name: spread(results.values(name, final("fid", True)), 1) for name in names}
    return table([{"model": names[name], "FID": fids[name], **_shares(results, name, True)} for name in names])


def _shares(results: Results, variant: str, guided: bool = False) -> dict[str, str]:
    names = {"precision": "precision", "recall": "recall", "class accuracy": "accuracy"}
    return {name: percent(results.values(variant, final(key, guided))) for name, key in names.items()}


def seeds_table(results: Results) -> str:
    """Held-out loss, FID and class accuracy of each run."""
    every = sorted({seed for seeds in results.runs.values() for seed in seeds})
    rows = []
    for variant, seeds in results.runs.items():
        row = {"model": results.label(variant)}
        for seed in every:
            run = seeds.get(seed)
            known = (
                [number(held_out_loss(run), 4), number(fid(run), 1), percent([final("accuracy")(run)])] if run else []
            )
            row[f"seed {seed}"] = " / ".join(each for each in known if each != NONE) or NONE
        rows.append(row)
    return table(rows)


def number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def percent(values: Sequence[float | None]) -> str:
    """Mean and deviation in %."""
    known = [100 * value for value in values if value is not None]
    return spread(known, 1).replace(" (1 seed)", "") + (" %" if known else "")


def pairs_table(results: Results) -> str:
    """Paired differences of models that the study compares with one another, not with the baseline."""
    rows = []
    for variant, other in results.study.pairs:
        if results.runs.keys() >= {variant, other} and results.pairs(variant, other):
            rows.append({
                "model": results.label(variant), "less": results.label(other),
                "time / the other's": spread(results.relative_time(variant, other), 3),
                "held-out loss": difference(results, variant, held_out_loss, 4, other),
                "FID": difference(results, variant, fid, 1, other),
            })  # fmt: skip
    return table(rows)


def difference(results: Results, variant: str, measure: Measure, digits: int, other: str | None = None) -> str:
    """Paired difference to another variant, its 95 % interval, and in how many seeds the variant is better."""
    differences = results.differences(variant, measure, other)
    if variant == results.recipe.baseline or not differences:
        return "0" if differences else NONE
    values = np.reshape(differences, (-1, 1))
    if measure is held_out_loss:  # (S, B); B is 1 where images were not scored one by one
        pairs = results.pairs(variant, other)
        values = np.array([np.subtract(*(_losses(run)[images_seen(run)] for run in pair)) for pair in pairs])
    found = interval([values], lambda mean: float(mean))
    limits = f" [{found[0]:+.{digits}f}, {found[1]:+.{digits}f}]" if found else ""
    better = sum(value < 0 for value in differences)
    return f"{spread(differences, digits, '+')}{limits}, better in {better} of {len(differences)}"


def _losses(run: Run) -> Points:
    if run.get("losses"):
        return {each["images_seen"]: np.array(each["blocks"]) for each in run["losses"]}
    return {seen: np.array([loss]) for seen, loss in loss_curve(run)}


def _fids(run: Run) -> Points:
    return {seen: np.array([value]) for seen, value in fid_curve(run)}


def equal_table(results: Results) -> str:
    """Images that one model needs for the value that the other one has at its end, with 95 % intervals."""
    rows = []
    for variant in results.compared:
        row = {"model": results.label(variant)}
        for name, points in (("loss", _losses), ("FID", _fids)):
            pairs = results.pairs(variant)
            longer = [points(other) | _longer_end(results, variant, other, points) for _, other in pairs]
            mine, others = [points(run) for run, _ in pairs], [points(other) for _, other in pairs]
            row[f"DiT's images to its {name}"] = _needed(list(zip(longer, mine, strict=True)))
            row[f"its images to DiT's {name}"] = _needed(list(zip(mine, others, strict=True)))
        rows.append(row)
    return table(rows)


def _longer_end(results: Results, variant: str, run: Run, points: Callable[[Run], Points]) -> Points:
    """The end of the longer run of the baseline, by which its curve is extended for other variants."""
    for name, seeds in results.runs.items():
        if results.study.variants[name].timed_as == run["variant"] and name != variant and run["seed"] in seeds:
            last = images_seen(seeds[run["seed"]])
            return {seen: value for seen, value in points(seeds[run["seed"]]).items() if seen == last}
    return {}


def _needed(pairs: list[tuple[Points, Points]]) -> str:
    """Images that the first of each pair needs for the last value of the second, of the mean curves over the seeds."""
    images = sorted(set.intersection(*(set(mine) for mine, _ in pairs))) if pairs else []
    if not images or not all(other for _, other in pairs):
        return NONE
    curves = np.array([[mine[seen] for seen in images] for mine, _ in pairs]).swapaxes(1, 2)  # (S, B, checkpoints)
    targets = np.array([other[max(other)] for _, other in pairs])  # (S, B)

    def needed(mean: np.ndarray, target: np.ndarray) -> float:
        return images_to_reach(images, mean, float(target))

    found = needed(curves.mean((0, 1)), targets.mean())
    return _count(found, images) + _limits(interval([curves, targets], needed), images)


def _limits(found: Interval | None, images: Sequence[int]) -> str:
    return f" [{_count(found[0], images)}, {_count(found[1], images)}]" if found else ""


def _count(value: float, images: Sequence[int]) -> str:
    if value == NOT_REACHED:
        return "not reached"
    return f"at most {images[0]:,}" if value == images[0] else f"{value:,.0f}"


def times_table(results: Results) -> str:
    """Paired difference to the baseline's held-out error in % of it, by part of the time axis (0: least noise)."""
    rows = []
    for variant in results.compared:
        row = {"model": results.label(variant)}
        for part in range(TIME_PARTS):
            ratios = [100 * (_error(run, part) / _error(other, part) - 1) for run, other in results.pairs(variant)]
            row[f"t in [{part / TIME_PARTS:.1f}, {(part + 1) / TIME_PARTS:.1f}) T"] = spread(ratios, 1, "+")
        rows.append(row)
    return table(rows)


def _error(run: Run, part: int) -> float:
    bins = error_bins(run)
    width = len(bins) // TIME_PARTS
    return statistics.mean(value for value in bins[part * width : (part + 1) * width] if value is not None)


def gates_table(results: Results) -> str:
    """What the gates choose at the end of the runs, over the seeds."""
    rows = []
    for variant, seeds in results.runs.items():
        gates = [run["gates"][-1] for _, run in sorted(seeds.items()) if run["gates"]]
        if not gates:
            continue

        def over_seeds(key: str, digits: int, gates: list[Any] = gates) -> str:
            return spread([found[key] for found in gates], digits)

        hottest = [max(max(row) / (sum(row) / len(row)) for row in found["loads"]) for found in gates]
        experts = sum(len(row) for row in gates[0]["loads"])
        rows.append({
            "model": results.label(variant), "hottest expert / mean load": spread(hottest, 2),
            "unused experts": f"{over_seeds('unused_experts', 1)} of {experts}",
            "distinct paths": over_seeds("distinct_paths", 0), "overlap, near": over_seeds("near", 2),
            "overlap, far": over_seeds("far", 2), "agreement with prior": over_seeds("prior_agreement", 2),
            "kept probability": over_seeds("kept_probability", 2), "gate entropy": over_seeds("entropy", 2),
        })  # fmt: skip
    return table(rows)


def search_table(search: dict[str, Any]) -> str:
    """The runs of the learning-rate search."""
    after = f"held-out loss after {search['images']:,} images"
    return table([
        {
            "learning rate": f"{run['learning_rate']:g}", after: f"{run['validation_loss']:.4f}",
            "chosen": "x" * (run["learning_rate"] == search["chosen"]),
        }
        for run in search["runs"]
    ])  # fmt: skip
