"""The page and the plots from the JSON files of finished runs; nothing is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments import tables
from experiments.results import Results, is_unguided, read_results
from experiments.studies import Study
from sdit.errors import DataError

TABLES = {
    "costs": tables.cost_table,
    "results": tables.results_table,
    "pairs": tables.pairs_table,
    "seeds": tables.seeds_table,
    "equal": tables.equal_table,
    "guided": tables.guided_table,
    "timesteps": tables.times_table,
    "gates": tables.gates_table,
}


def write_page(study: Study, folder: Path, front_page: Path | None = None) -> list[Path]:
    """Fill the marked blocks of README.md and draw the plots from results/*.json; return what was written.

    `front_page`: a page with room for the table of results. Raises: DataError when no run is finished.
    """
    from experiments.plots import draw_plots  # a second to import

    found = read_results(study, folder / "results")
    if not any(results.runs for results in found):
        raise DataError(f"{folder / 'results'}: holds no result of a finished run; train first, without --write")
    plots = draw_plots(found, folder)
    blocks = {name: text for results in found for name, text in blocks_of(results, folder).items()}
    blocks |= {
        "missing": missing(found),
        "plots": "\n\n".join(f"![{text}]({path.name})" for path, text in plots.items()),
    }
    floor = _read(folder / "results" / "floor.json")
    if floor:
        blocks["floor"] = floor_text(floor)
    written = [folder / "README.md", *plots]
    pages = {folder / "README.md": "".join(map(_empty_block, blocks))}
    if front_page is not None:
        pages[front_page], blocks["convergence"] = "", blocks["results"]
        written.append(front_page)
    for page, empty in pages.items():
        text = page.read_text(encoding="utf-8") if page.exists() else empty
        page.write_text(fill_blocks(text, blocks), encoding="utf-8")
    return written


def blocks_of(results: Results, folder: Path) -> dict[str, str]:
    """The blocks of one recipe; their names end with that of the recipe."""
    end = f"-{results.recipe.name}" if results.recipe.name else ""
    blocks = {f"{name}{end}": describe(results) for name, describe in TABLES.items()}
    search = _read(folder / "results" / f"search{end}.json")
    blocks[f"search{end}"] = tables.search_table(search) if search else "No learning rate was searched yet."
    blocks[f"setup{end}"] = setup(results) if results.runs else "No run is finished."
    return blocks


def setup(results: Results) -> str:
    """The size of the experiment, in words."""
    every = [run for seeds in results.runs.values() for run in seeds.values()]
    run, config = every[0], every[0]["config"]
    model, train = config["model"], config["train"]
    held_out = run["losses"][-1]["images"] if run.get("losses") else run["held_out"][-1]["validation_images"]
    text = (
        f"Depth {model['depth']}, width {model['width']}, {model['heads']} heads, patch {model['patch_size']} on "
        f"{model['input_size']} x {model['input_size']} pixels; {train['images']:,} images in batches of "
        f"{train['global_batch']}, AdamW at {config['optimizer']['learning_rate']:g} with "
        f"{config['optimizer']['decay']} decay, EMA {config['ema']['decay']:g}, {train['precision']}; finished runs: "
        f"{len(every)}, seeds {', '.join(map(str, sorted({run['seed'] for run in every})))}; "
        f"held-out loss on {held_out:,} images"
    )
    scores = [score for run in every for score in run["scores"] if is_unguided(score)]
    if scores:
        last = max(scores, key=lambda score: score["images"])
        text += f"; FID of {last['images']:,} samples ({last['sampler']}, {last['steps']} steps, no guidance, EMA)"
    return text + "."


def floor_text(floor: dict[str, Any]) -> str:
    """What real images score."""
    text = f"FID of the same number of real held-out images: {floor['fid']:.1f}"
    if "accuracy" in floor:
        text += f", precision {100 * floor['precision']:.1f} %, recall {100 * floor['recall']:.1f} %"
        text += f", class accuracy {100 * floor['accuracy']:.1f} %"
    return f"{text} (features: a classifier of {100 * floor['features']['held_out_accuracy']:.1f} % held-out accuracy)."


def missing(found: list[Results]) -> str:
    """The runs without a result: a line for each recipe and set of seeds."""
    rows: dict[str, list[str]] = {}
    for results in found:
        for name, variant in results.study.variants.items():
            seeds = [seed for seed in results.study.seeds if seed not in results.runs.get(name, {})]
            if variant.recipe == results.recipe and seeds:
                label = f"{variant.recipe.label}, " if variant.recipe.label else ""
                rows.setdefault(f"{label}seeds {', '.join(map(str, seeds))}", []).append(variant.label)
    lines = [f"* {runs}: {'; '.join(labels)}" for runs, labels in rows.items()]
    return "Runs that are missing:\n\n" + "\n".join(lines) if lines else "No run is missing."


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


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
