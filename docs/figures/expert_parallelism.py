#!/usr/bin/env python3
"""Draw the figures of docs/expert-parallelism.md next to this script. No run is needed.

Routes are those that the diffusion prior asks for: 12 blocks of M = 16 experts, k = 2, shapes of Switch-DiT-S/2.
Placements, transfers and bytes come from `sdit.expert_parallel`.

usage: python docs/figures/expert_parallelism.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from sdit.config import ExpertsConfig, ModelConfig
from sdit.expert_parallel.placement import place_experts
from sdit.expert_parallel.routing_table import RoutingTable, exact_loads, hottest
from sdit.expert_parallel.traffic_model import UnitCosts, expert_parameters
from sdit.model.windows import expert_windows

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

HERE = Path(__file__).resolve().parent
DEPTH, COUNT, TOP_K, WIDTH, TOKENS, RANKS = 12, 16, 2, 384, 256, 4
COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44"]
GREY, DARK, INK = "#d8d8d8", "#555555", "#222222"
STYLE = {
    "svg.hashsalt": "sdit",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "figure.facecolor": "white",
}


def main() -> None:
    """Write the four figures as SVG files."""
    plt.rcParams.update(STYLE)  # type: ignore[arg-type]
    routes = prior_routes()
    save("routes", draw_placements(routes))
    save("steps", draw_steps())
    save("exchange", draw_exchange())
    save("bytes", draw_measured_bytes())


def save(name: str, figure: Any) -> None:
    """Write a figure without a date, so that the same figure has the same bytes."""
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def prior_routes() -> RoutingTable:
    """Return the routes of all T tasks that follow the windows of the prior, with the ids of experts in random order."""
    windows = expert_windows(ModelConfig(depth=DEPTH, experts=ExpertsConfig(count=COUNT, top_k=TOP_K)))
    used = windows.mask.reshape(-1, COUNT, DEPTH).transpose(2, 0, 1)  # (depth, T, M)
    experts = np.nonzero(used)[2].reshape(DEPTH, -1, TOP_K)
    random = np.random.default_rng(0)
    ids = np.stack([random.permutation(COUNT) for _ in range(DEPTH)])
    experts = np.take_along_axis(ids[:, None].repeat(experts.shape[1], axis=1), experts, axis=2)
    return RoutingTable(experts, np.full(experts.shape, 1 / TOP_K, dtype=np.float32), COUNT)


def draw_placements(routes: RoutingTable, block: int = 6) -> Any:
    """Draw which rank serves each task in one block: experts placed by id, and by path with the hottest replicated."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
    hot = hottest(exact_loads(routes.experts, COUNT), TOP_K)
    time_of_expert = [np.nonzero(routes.experts[block] == expert)[0].mean() for expert in range(COUNT)]
    order = np.argsort(time_of_expert)
    for axis, kind, replicated in zip(axes, ("index", "path"), (np.zeros_like(hot), hot), strict=True):
        rank = place_experts(kind, routes, RANKS, replicated)[block]  # type: ignore[arg-type]
        rank = np.where(replicated[block], RANKS, rank)
        image = np.full((routes.tasks, COUNT), -1)
        np.put_along_axis(image, routes.experts[block], rank[routes.experts[block]], axis=1)
        axis.imshow(image[::4, order], aspect="auto", cmap=ListedColormap(["white", *COLOURS, DARK]), vmin=-1, vmax=RANKS,
                    interpolation="nearest", extent=(0, COUNT, routes.tasks, 0))  # fmt: skip
        axis.set_title("placement: index" if kind == "index" else "placement: path, two experts replicated", fontsize=9)
        axis.set_xticks([])
        axis.set_xlabel(f"the {COUNT} experts of block {block}, sorted by mean timestep")
    axes[0].set_ylabel("timestep t (0: least noise)")
    patches = [Patch(color=colour, label=f"on rank {number}") for number, colour in enumerate(COLOURS)]
    figure.legend(handles=[*patches, Patch(color=DARK, label="replicated on all ranks")], loc="lower center", ncols=5,
                  frameon=False, bbox_to_anchor=(0.5, -0.12))  # fmt: skip
    return figure


def draw_steps() -> Any:
    """Draw the order of work in two blocks, for routes per token and for routes per sample."""
    figure, axis = plt.subplots(figsize=(8, 2.7))
    token = [("gate", 0.8, COLOURS[3]), ("counts", 1.0, COLOURS[1]), ("tokens out", 1.1, COLOURS[0]),
             ("experts", 1.2, COLOURS[2]), ("tokens back", 1.1, COLOURS[0]), ("attention, MLP", 1.6, GREY)]  # fmt: skip
    sample = [("dispatch", 1.2, COLOURS[0]), ("local experts", 1.2, COLOURS[2]), ("remote experts", 1.2, COLOURS[2]),
              ("combine", 1.2, COLOURS[0]), ("attention, MLP", 1.6, GREY)]  # fmt: skip
    draw_row(axis, 1.0, token + token)
    draw_row(axis, 0.0, [("plan of all blocks", 1.0, COLOURS[3]), *sample, *sample])
    axis.set_yticks([1.0, 0.0], ["routes per token:\nstock MoE layer", "routes per sample:\nsdit"])
    axis.set_xticks([])
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(left=False)
    axis.set_xlim(0, 14.6)
    axis.set_ylim(-0.5, 1.5)
    axis.set_xlabel("order of work on one rank in two blocks (widths are not times)")
    return figure


def draw_row(axis: Any, height: float, parts: list[tuple[str, float, str]]) -> None:
    """Draw boxes one after another."""
    left = 0.0
    for text, width, colour in parts:
        axis.barh(height, width - 0.06, left=left, height=0.55, color=colour)
        ink = INK if colour in (GREY, COLOURS[3]) else "white"
        axis.text(
            left + width / 2 - 0.03, height, text.replace(" ", "\n"), ha="center", va="center", fontsize=6.5, color=ink
        )
        left += width


def draw_exchange() -> Any:
    """Draw the bytes of one expert over the samples that use it on another rank, for samples and for weights."""
    figure, axis = plt.subplots(figsize=(6.5, 3.2))
    samples = np.arange(1, 65)
    costs = {
        kind: UnitCosts(4 * TOKENS * WIDTH, 4 * expert_parameters(ExpertsConfig(kind=kind), WIDTH), RANKS)
        for kind in ("linear", "mlp")
    }
    axis.plot(samples, samples * costs["linear"].transfer_bytes / 1e6, color=COLOURS[0], label="samples travel")
    for kind, colour in zip(costs, COLOURS[1:], strict=False):
        replica, article = costs[kind].replica_bytes / 1e6, "an" if kind == "mlp" else "a"
        axis.axhline(replica, color=colour, label=f"weights of {article} {kind} expert travel")
        equal = costs[kind].replica_bytes / costs[kind].transfer_bytes
        axis.plot(equal, replica, "o", color=INK, markersize=4)
    axis.set_xlabel("samples that use the expert on a rank other than its own, in one micro-step")
    axis.set_ylabel("MB between ranks")
    axis.set_yscale("log")
    axis.legend(frameon=False)
    return figure


def draw_measured_bytes() -> Any:
    """Draw the measured bytes of the table in docs/performance.md (tests/distributed/exchange_bytes.py)."""
    figure, axis = plt.subplots(figsize=(6.5, 2.6))
    measured = {"16 samples per rank": (10.19, 1.70, 0.259), "64 samples per rank": (32.7, 6.72, 0.318)}
    names = ("DeepSpeed MoE, dropless", "sdit, tokens, index, order", "sdit, auto, path, path (default)")
    for group, (case, values) in enumerate(measured.items()):
        for row, (name, value, colour) in enumerate(
            zip(names, values, COLOURS[1:2] + COLOURS[3:] + COLOURS[:1], strict=True)
        ):
            height = group * 4 + row
            axis.barh(height, value, color=colour, label=name if group == 0 else None)
            axis.text(value * 1.08, height, f"{value:g} GB", va="center", fontsize=8)
        axis.text(0.052, group * 4 - 0.9, case, fontsize=8, weight="bold")
    axis.set_xscale("log")
    axis.set_xlim(0.05, 130)
    axis.set_ylim(6.6, -1.6)
    axis.set_yticks([])
    axis.set_xlabel("GB between 4 ranks in one micro-step, learned routes")
    axis.legend(frameon=False, loc="lower right", fontsize=8, bbox_to_anchor=(1.0, 0.98), ncols=3, columnspacing=1.0)
    return figure


if __name__ == "__main__":
    main()
