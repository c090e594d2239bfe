"""The page and the plots from the JSON files of finished runs; nothing is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.tables import Runs, gates_table, results_table, search_table, summary_table, timestep_table
from experiments.variants import VARIANTS
from sdit.errors import DataError


def read_runs(folder: Path) -> Runs:
    """The results of all finished runs in a folder."""
    runs: Runs = {}
    for variant in VARIANTS:
        found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{variant}-seed*.json"))]
        if found:
            runs[variant] = {run["seed"]: run for run in found}
    for variant, seeds in runs.items():
        twins = runs.get(VARIANTS[variant].timed_as or "", {})
        for seed in seeds.keys() & twins.keys():
            seeds[seed]["cost"]["wall_seconds_per_image"] = twins[seed]["cost"]["wall_seconds_per_image"]
    return runs


def changed_keys(then: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value then, value now) of what two configs hold differently; keys that one of them does not know are equal."""
    for key in then.keys() & now.keys():
        if isinstance(then[key], dict) and isinstance(now[key], dict):
            yield from changed_keys(then[key], now[key], f"{prefix}{key}.")
        elif then[key] != now[key]:
            yield f"{prefix}{key}", then[key], now[key]


def check_alike(runs: Runs) -> None:
    """Raises: DataError when results differ in more than the model, its prior, the seed and the length."""
    first = next(iter(next(iter(runs.values())).values()))
    for variant, seeds in runs.items():
        for seed, run in seeds.items():
            for key, one, other in changed_keys(first["config"], run["config"]):
                if not key.startswith(("model.", "prior.", "seed", "train.images")):
                    raise DataError(
                        f"results/{variant}-seed{seed}.json: has {key} {other}, {first['variant']}-seed{first['seed']}.json "
                        f"{one}; legal: results of one experiment"
                    )


def setup(runs: Runs) -> str:
    """The size of the experiment, in words."""
    run = next(iter(next(iter(runs.values())).values()))
    model, train, config = run["config"]["model"], run["config"]["train"], run["config"]
    score = next((score for seeds in runs.values() for each in seeds.values() for score in each["scores"]), None)
    text = (
        f"Depth {model['depth']}, width {model['width']}, {model['heads']} heads, patch {model['patch_size']} on "
        f"{model['input_size']} x {model['input_size']} pixels; {train['images']:,} images in batches of "
        f"{train['global_batch']}, AdamW at {config['optimizer']['learning_rate']:g} with "
        f"{config['optimizer']['decay']} decay, EMA {config['ema']['decay']:g}, {train['precision']}; finished runs: "
        f"{sum(map(len, runs.values()))}, seeds {', '.join(map(str, sorted({s for each in runs.values() for s in each})))}; "
        f"held-out loss on {run['held_out'][-1]['validation_images']:,} images"
    )
    if score is not None:
        text += f"; FID of {score['images']:,} samples ({score['sampler']}, {score['steps']} steps, no guidance, EMA)"
    return text + "."


def floor_text(floor: dict[str, Any]) -> str:
    """What real images score."""
    return (
        f"FID of the same number of real held-out images: {floor['fid']:.1f} "
        f"(features: a classifier of {100 * floor['features']['held_out_accuracy']:.1f} % held-out accuracy)."
    )


def write_study(folder: Path, front_page: Path | None = None) -> list[Path]:
    """Fill the marked blocks of README.md and draw the plots from results/*.json; return what was written.

    `front_page`: a page with room for the summary alone. Raises: DataError when no run is finished.
    """
    from experiments.plots import draw_plots  # a second to import

    results = folder / "results"
    runs = read_runs(results)
    if not runs:
        raise DataError(f"{results}: holds no result of a finished run; train first, without --write")
    check_alike(runs)
    blocks = {"setup": setup(runs), "results": results_table(runs), "timesteps": timestep_table(runs)}
    blocks["gates"] = gates_table(runs)
    for name, describe in (("search", search_table), ("floor", floor_text)):
        if (results / f"{name}.json").exists():
            blocks[name] = describe(json.loads((results / f"{name}.json").read_text(encoding="utf-8")))
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else "".join(map(_empty_block, blocks))
    readme.write_text(fill_blocks(text, blocks), encoding="utf-8")
    written = [readme, *draw_plots(runs, folder)]
    if front_page is not None:
        before = front_page.read_text(encoding="utf-8")
        after = fill_blocks(before, {"convergence": summary_table(runs)})
        if after != before:
            front_page.write_text(after, encoding="utf-8")
            written.append(front_page)
    return written


def fill_blocks(text: str, blocks: dict[str, str]) -> str:
    """`text` with everything between <!-- NAME --> and <!-- end NAME --> replaced by the block of that name."""
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        before, found, rest = text.partition(begin)
        if found:
            text = f"{before}{begin}{block}\n{end}{rest.partition(end)[2]}"
    return text


def _empty_block(name: str) -> str:
    return f"<!-- {name} -->\n<!-- end {name} -->\n\n"
