"""Curves against images and wall-clock, differences by seed, samples, and what the gates have learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.tables import Run, Runs, fid, held_out_loss, paired
from experiments.variants import BASELINE, VARIANTS

DPI = 80
LOSSES_SHOWN = 1.5  # times the lowest
COLOURS = dict(zip(VARIANTS, pyplot.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
Curve = Callable[[Run], list[tuple[int, float]]]  # (images seen, value) of a run


def loss_curve(run: Run) -> list[tuple[int, float]]:
    return [(record["images_seen"], record["validation_loss"]) for record in run["held_out"]]


def fid_curve(run: Run) -> list[tuple[int, float]]:
    return [(score["images_seen"], score["fid"]) for score in run["scores"]]


def draw_plots(runs: Runs, folder: Path) -> list[Path]:
    """Write curves.png, differences.png and, where there is something to show, samples.png and gates.png."""
    drawn = [_save(_curves(runs), folder / "curves.png"), _save(_differences(runs), folder / "differences.png")]
    gates = {name: found for name, seeds in runs.items() if (found := _last_gates(seeds))}
    strips = {name: path for name in runs if (path := folder / "results" / f"{name}.png").exists()}
    if strips:
        drawn.append(_save(_samples(strips), folder / "samples.png"))
    if gates:
        drawn.append(_save(_gates(gates), folder / "gates.png"))
    return drawn


def _curves(runs: Runs) -> Figure:
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for row, (curve, name) in enumerate(((loss_curve, "held-out loss"), (fid_curve, "FID"))):
        for against_time, axis in zip((False, True), axes[row], strict=True):
            for variant, seeds in runs.items():
                _mean_curve(axis, variant, seeds, curve, against_time)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.set_ylabel(name)
            if curve is loss_curve:  # the first images say little, and take most of the axis
                axis.set_ylim(
                    top=LOSSES_SHOWN
                    * min(value for seeds in runs.values() for run in seeds.values() for _, value in curve(run))
                )
            axis.set_xlabel("seconds of training (wall-clock)" if against_time else "images")
            axis.grid(alpha=0.3, which="both")
    axes[0, 0].legend(fontsize=8)
    return figure


def _mean_curve(axis: Axes, variant: str, seeds: dict[int, Run], curve: Curve, against_time: bool) -> None:
    """Mean over the seeds as a line, lowest to highest as a band; only where all seeds have a value."""
    values: dict[int, list[float]] = {}
    for run in seeds.values():
        for seen, value in curve(run):
            values.setdefault(seen, []).append(value)
    seconds = np.mean([run["cost"]["wall_seconds_per_image"] for run in seeds.values()])
    images = sorted(count for count, found in values.items() if len(found) == len(seeds))
    if not images:
        return
    x = np.array(images) * (seconds if against_time else 1.0)
    y = np.array([values[count] for count in images])
    axis.plot(x, y.mean(1), "o-", color=COLOURS[variant], label=VARIANTS[variant].label, markersize=3, linewidth=1)
    axis.fill_between(x, y.min(1), y.max(1), color=COLOURS[variant], alpha=0.15)


def _differences(runs: Runs) -> Figure:
    """Every seed's difference to the baseline as a dot; left of zero is better."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3), layout="constrained", sharey=True)
    variants = [name for name in runs if name != BASELINE]
    for axis, measure, name in zip(axes, (held_out_loss, fid), ("held-out loss", "FID"), strict=True):
        for row, variant in enumerate(variants):
            found = paired(runs, variant, measure)
            axis.plot(found, [row] * len(found), "o", color=COLOURS[variant], alpha=0.8)
            if found:
                axis.plot(np.mean(found), row, "|", color="black", markersize=16)
        axis.axvline(0, color="grey", linewidth=1)
        axis.locator_params(axis="x", nbins=6)
        axis.set_xlabel(f"{name} less DiT's, by seed (bar: mean); left is better")
        axis.set_ylim(-0.6, len(variants) - 0.4)
        axis.set_yticks(range(len(variants)), [VARIANTS[name].label for name in variants])
        axis.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    return figure


def _samples(strips: dict[str, Path]) -> Figure:
    """One image of every class, a row for each model."""
    figure, axes = pyplot.subplots(
        len(strips), 1, figsize=(6.5, 0.85 * len(strips)), layout="constrained", squeeze=False
    )
    for axis, (variant, path) in zip(axes[:, 0], strips.items(), strict=True):
        axis.imshow(pyplot.imread(path), cmap="gray", vmin=0, vmax=1)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_title(VARIANTS[variant].label, loc="left", fontsize=8, pad=2)
    return figure


def _last_gates(seeds: dict[int, Run]) -> dict[str, Any] | None:
    """The gates at the end of the first seed that has them."""
    return next((run["gates"][-1] for _, run in sorted(seeds.items()) if run["gates"]), None)


def _gates(gates: dict[str, dict[str, Any]]) -> Figure:
    """Above, how much of their paths two tasks share; below, the expected share of samples that use each expert of each block."""
    figure, axes = pyplot.subplots(2, len(gates), figsize=(2.6 * len(gates), 5), layout="constrained", squeeze=False)
    for column, (variant, found) in enumerate(gates.items()):
        shared = axes[0, column].imshow(found["overlap"], vmin=0, vmax=1, origin="lower", extent=(0, 1, 0, 1))
        axes[0, column].set_title(VARIANTS[variant].label, fontsize=8)
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
