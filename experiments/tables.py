"""What finished runs come to: measures, differences by seed, and the tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from experiments.variants import BASELINE, VARIANTS

Run = dict[str, Any]
Runs = dict[str, dict[int, Run]]  # variant, in the order of VARIANTS -> seed -> result
TIME_PARTS = 5  # equal parts of the time axis in the table of losses by timestep


def held_out_loss(run: Run) -> float:
    """Error of the noise plus the variational bound's term, at the end of the run, with the averaged weights."""
    return run["held_out"][-1]["validation_loss"]


def held_out_mse(run: Run) -> float:
    """Error of the noise alone."""
    return run["held_out"][-1]["validation_mse"]


def fid(run: Run) -> float | None:
    """At the end of the run; None where it is not scored yet."""
    last = run["held_out"][-1]["images_seen"]
    return next((score["fid"] for score in run["scores"] if score["images_seen"] == last), None)


def wall_milliseconds(run: Run) -> float:
    """Wall-clock of training for an image."""
    return 1e3 * run["cost"]["wall_seconds_per_image"]


def training_seconds(run: Run) -> float:
    """Wall-clock of the whole training, without checkpoints and held-out losses."""
    return run["cost"]["wall_seconds_per_image"] * run["held_out"][-1]["images_seen"]


def relative_time(runs: Runs, variant: str) -> list[float]:
    """Wall-clock of the whole training over the baseline's, seed by seed: the models of a seed took turns."""
    return [
        training_seconds(run) / training_seconds(runs[BASELINE][seed])
        for seed, run in sorted(runs[variant].items())
        if seed in runs.get(BASELINE, {})
    ]


def values_of(seeds: dict[int, Run], measure: Callable[[Run], float | None]) -> list[float]:
    """The measure of every seed that has it."""
    return [value for _, run in sorted(seeds.items()) if (value := measure(run)) is not None]


def paired(runs: Runs, variant: str, measure: Callable[[Run], float | None]) -> list[float]:
    """The variant's measure less the baseline's, seed by seed: a seed's data order, timesteps and noise are the same."""
    differences = []
    for seed, run in sorted(runs[variant].items()):
        mine, other = measure(run), measure(runs[BASELINE][seed]) if seed in runs.get(BASELINE, {}) else None
        if mine is not None and other is not None:
            differences.append(mine - other)
    return differences


def spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Mean ± standard deviation of the sample; a single value has no deviation."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else f"{mean} (1 seed)"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def results_table(runs: Runs) -> str:
    """One row a variant: cost, held-out error, FID, and the differences to the baseline by seed."""
    rows = []
    for variant, seeds in runs.items():
        cost = next(iter(seeds.values()))["cost"]
        rows.append([
            VARIANTS[variant].label,
            f"{cost['parameters'] / 1e6:.2f}", f"{cost['flops_per_image'] / 1e6:.0f}",
            spread(values_of(seeds, wall_milliseconds), 2), spread(relative_time(runs, variant), 3),
            spread(values_of(seeds, held_out_loss), 4), difference(runs, variant, held_out_loss, 4),
            spread(values_of(seeds, held_out_mse), 4), difference(runs, variant, held_out_mse, 4),
            spread(values_of(seeds, fid), 1), difference(runs, variant, fid, 1),
        ])  # fmt: skip
    head = [
        "model", "parameters, M", "MFLOP / image", "ms / image", "time / DiT's", "held-out loss", "less DiT's", "held-out MSE",
        "less DiT's", "FID", "less DiT's",
    ]  # fmt: skip
    return table(head, rows)


def summary_table(runs: Runs) -> str:
    """The results in few columns."""
    rows = [
        [
            VARIANTS[variant].label, spread(relative_time(runs, variant), 3),
            spread(values_of(seeds, held_out_loss), 4), difference(runs, variant, held_out_loss, 4),
            spread(values_of(seeds, fid), 0), difference(runs, variant, fid, 0),
        ]
        for variant, seeds in runs.items()
    ]  # fmt: skip
    return table(["model", "time / DiT's", "held-out loss", "less DiT's", "FID", "less DiT's"], rows)


def difference(runs: Runs, variant: str, measure: Callable[[Run], float | None], digits: int) -> str:
    """Paired difference to the baseline, and in how many seeds the variant is better."""
    if variant == BASELINE:
        return "0"
    differences = paired(runs, variant, measure)
    better = sum(value < 0 for value in differences)
    return f"{spread(differences, digits, '+')}, better in {better} of {len(differences)}" if differences else "-"


def timestep_table(runs: Runs) -> str:
    """Paired difference to the baseline's held-out MSE in % of it, by part of the time axis (0: least noise)."""
    rows = []
    for variant in (name for name in runs if name != BASELINE):
        cells = []
        for part in range(TIME_PARTS):
            ratios = [
                100 * (_part(run, part) / _part(runs[BASELINE][seed], part) - 1)
                for seed, run in sorted(runs[variant].items())
                if seed in runs.get(BASELINE, {})
            ]
            cells.append(spread(ratios, 1, "+"))
        rows.append([VARIANTS[variant].label, *cells])
    steps = [f"t in [{part / TIME_PARTS:.1f}, {(part + 1) / TIME_PARTS:.1f}) T" for part in range(TIME_PARTS)]
    return table(["model", *steps], rows)


def _part(run: Run, part: int) -> float:
    bins = run["held_out"][-1]["validation_loss_by_timestep"]
    width = len(bins) // TIME_PARTS
    inside = [value for value in bins[part * width : (part + 1) * width] if value is not None]
    return statistics.mean(inside)


def gates_table(runs: Runs) -> str:
    """What the gates choose at the end of the runs, over the seeds."""
    rows = []
    for variant, seeds in runs.items():
        gates = [run["gates"][-1] for _, run in sorted(seeds.items()) if run["gates"]]
        if not gates:
            continue

        def over_seeds(key: str, digits: int, gates: list[Any] = gates) -> str:
            return spread([found[key] for found in gates], digits)

        hottest = [max(max(row) / (sum(row) / len(row)) for row in found["loads"]) for found in gates]
        experts = sum(len(row) for row in gates[0]["loads"])
        rows.append([
            VARIANTS[variant].label, spread(hottest, 2), f"{over_seeds('unused_experts', 1)} of {experts}",
            over_seeds("distinct_paths", 0), over_seeds("near", 2), over_seeds("far", 2),
            over_seeds("prior_agreement", 2), over_seeds("kept_probability", 2), over_seeds("entropy", 2),
        ])  # fmt: skip
    head = [
        "model", "hottest expert / mean load", "unused experts", "distinct paths", "overlap, near", "overlap, far",
        "agreement with prior", "kept probability", "gate entropy",
    ]  # fmt: skip
    return table(head, rows)


def search_table(search: dict[str, Any]) -> str:
    """The runs of the learning-rate search."""
    rows = [
        [f"{run['learning_rate']:g}", f"{run['validation_loss']:.4f}", "x" * (run["learning_rate"] == search["chosen"])]
        for run in search["runs"]
    ]
    return table(["learning rate", f"held-out loss after {search['images']:,} images", "chosen"], rows)
