"""The page: one file without scripts that loads nothing from a server."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from sdit import __version__
from sdit.report.elements import colour_of
from sdit.report.experts import experts_section
from sdit.report.history import checkpoints_section, faults_section, samples_section, scores_section, state_of, tiles_of
from sdit.report.losses import loss_section
from sdit.report.record import RunRecord
from sdit.report.setup import config_section, data_section, environment_section, topology_section
from sdit.report.speed import speed_section
from sdit.report.token_experts import token_experts_section
from sdit.report.values import is_number

SECTIONS = (
    loss_section, samples_section, scores_section, speed_section, experts_section, token_experts_section,
    faults_section, checkpoints_section,
    data_section, topology_section, config_section, environment_section,
)  # fmt: skip
ROWS = 40  # of a table; further rows are folded
MAX_ROWS = 400  # of a table; further rows are only counted
VARIANTS = {"switch": "Switch-DiT", "dit": "DiT", "dtr": "DTR"}


def build_page(runs: Sequence[RunRecord]) -> str:
    """Return the HTML of a report about one or several runs. Equal files give equal text."""
    sections = [section for build in SECTIONS if (section := build(runs)).grids]
    environment = Environment(
        loader=PackageLoader("sdit.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip
    return environment.get_template("page.html").render(
        runs=runs, sections=sections, subtitle=_subtitle(runs), colours=[colour_of(number) for number in range(len(runs))],
        states=[state_of(run) for run in runs], tiles=[tiles_of(run) for run in runs], version=__version__, row_limit=ROWS,
        last_row=MAX_ROWS,
    )  # fmt: skip


def _subtitle(runs: Sequence[RunRecord]) -> str:
    """Return a description of the model for one run, or the number of runs for several."""
    if len(runs) > 1:
        return f"{len(runs)} runs side by side"
    run = runs[0]
    model = {key: run.config.get(f"model.{key}") for key in ("variant", "depth", "width", "input_size", "channels")}
    words = [VARIANTS.get(str(model["variant"]), "model unknown")]
    if all(is_number(model[key]) for key in ("depth", "width", "input_size", "channels")):
        words.append(f"{model['depth']} blocks of width {model['width']}")
        if model["variant"] == "switch" and "model.experts.count" in run.config:
            words.append(f"{run.config['model.experts.count']} experts, {run.config.get('model.experts.top_k')} used")
        if is_number(run.config.get("model.moe.experts")):
            words.append(f"{run.config['model.moe.experts']} token-routed experts in a block")
        words.append(f"images of {model['input_size']} x {model['input_size']} x {model['channels']}")
    images = run.last.get("images_seen")
    if is_number(images) and run.total_images and images < run.total_images:
        words.append(f"{images / run.total_images:.0%} done")
    return ", ".join(words)
