"""Curves against images and time, samples, and what the gates have learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.results import Results, Run, fid_curve, loss_curve
from experiments.tables import Curve

DPI = 80
LOSSES_SHOWN = 1.5  # times the lowest
COLOURS = pyplot.get_cmap("tab10").colors  # type: ignore[attr-defined]


def draw_plots(found: list[Results], folder: Path) -> dict[Path, str]:
    """Write the curves of each recipe, samples.png and gates.png; return what each of them shows."""
    drawn = {}
    for results in filter(lambda each: each.runs, found):
        end, label = ("-" + results.recipe.name, f", {results.recipe.label}") if results.recipe.name else ("", "")
        text = f"held-out loss and FID against images and time{label}"
        drawn[_save(_curves(results), folder / f"curves{end}.png")] = text
    names = {name: found[0].study.variants[name].full_label for results in found for name in results.runs}
    strips = {label: folder / "results" / f"{name}.png" for name, label in names.items()}
    strips = {label: path for label, path in strips.items() if path.exists()}
    gates = {names[name]: _last_gates(seeds) for results in found for name, seeds in results.runs.items()}
    gates = {label: last for label, last in gates.items() if last}
    if strips:
        drawn[_save(_samples(strips), folder / "samples.png")] = "one sample of each class, first seed"
    if gates:
        drawn[_save(_gates(gates), folder / "gates.png")] = "shared paths and loads of the first seed"
    return drawn


def _colour(results: Results, variant: str) -> Any:
    rows = [name for name, each in results.study.variants.items() if each.recipe == results.recipe]
    return COLOURS[rows.index(variant)]


def _curves(results: Results) -> Figure:
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for row, (curve, name) in enumerate(((loss_curve, "held-out loss"), (fid_curve, "FID"))):
        for against_time, axis in zip((False, True), axes[row], strict=True):
            for variant in results.runs:
                _mean_curve(axis, results, variant, curve, against_time)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.set_ylabel(name)
            if curve is loss_curve:  # the first images say little, and take most of the axis
                lowest = min(
                    value for seeds in results.runs.values() for run in seeds.values() for _, value in curve(run)
                )
                axis.set_ylim(top=LOSSES_SHOWN * lowest)
            axis.set_xlabel(f"seconds of training ({results.study.clock} time)" if against_time else "images")
            axis.grid(alpha=0.3, which="both")
    axes[0, 0].legend(fontsize=8)
    return figure


def _mean_curve(axis: Axes, results: Results, variant: str, curve: Curve, against_time: bool) -> None:
    """Mean over the seeds as a line, lowest to highest as a band; only where all seeds have a value."""
    seeds = results.runs[variant]
    values: dict[int, list[float]] = {}
    for run in seeds.values():
        for seen, value in curve(run):
            values.setdefault(seen, []).append(value)
    images = sorted(count for count, found in values.items() if len(found) == len(seeds))
    if not images:
        return
    seconds = np.mean(results.values(variant, results.milliseconds)) / 1e3
    x = np.array(images) * (seconds if against_time else 1.0)
    y = np.array([values[count] for count in images])
    colour = _colour(results, variant)
    axis.plot(x, y.mean(1), "o-", color=colour, label=results.label(variant), markersize=3, linewidth=1)
    axis.fill_between(x, y.min(1), y.max(1), color=colour, alpha=0.15)


def _samples(strips: dict[str, Path]) -> Figure:
    """One image of every class, a row for each model."""
    size = (6.5, 0.85 * len(strips))
    figure, axes = pyplot.subplots(len(strips), 1, figsize=size, layout="constrained", squeeze=False)
    for axis, (label, path) in zip(axes[:, 0], strips.items(), strict=True):
        axis.imshow(pyplot.imread(path), cmap="gray", vmin=0, vmax=1)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_title(label, loc="left", fontsize=8, pad=2)
    return figure


def _last_gates(seeds: dict[int, Run]) -> dict[str, Any] | None:
    """The gates at the end of the first seed that has them."""
    return next((run["gates"][-1] for _, run in sorted(seeds.items()) if run["gates"]), None)


def _gates(gates: dict[str, Any]) -> Figure:
    """Above, how much of their paths two tasks share; below, the expected share of samples that use each expert of each block."""
    figure, axes = pyplot.subplots(2, len(gates), figsize=(2.6 * len(gates), 5), layout="constrained", squeeze=False)
    for column, (label, found) in enumerate(gates.items()):
        shared = axes[0, column].imshow(found["overlap"], vmin=0, vmax=1, origin="lower", extent=(0, 1, 0, 1))
        axes[0, column].set_title(label.replace(", ", "\n"), fontsize=8)
        axes[0, column].set_xlabel("t / T (1: noise alone)", fontsize=8)
        loads = axes[1, column].imshow(found["loads"], vmin=0, vmax=1, aspect="auto", cmap="magma")
        axes[1, column].set_xlabel("expert", fontsize=8)
    axes[0, 0].set_ylabel("t / T", fontsize=8)
    axes[1, 0].set_ylabel("block", fontsize=8)
    figure.colorbar(shared, ax=axes[0], label="share of the path in common")
    figure.colorbar(loads, ax=axes[1], label="share of samples")
    return figure


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
    return path
