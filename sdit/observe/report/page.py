"""The page: one file, nothing to fetch, no script."""

from __future__ import annotations

from collections.abc import Sequence

from sdit import __version__
from sdit.observe.report.data import data_section
from sdit.observe.report.history import checkpoints_section, faults_section, samples_section, summary
from sdit.observe.report.html import Html, join, tag
from sdit.observe.report.losses import loss_section
from sdit.observe.report.numbers import is_number
from sdit.observe.report.record import RunRecord
from sdit.observe.report.routes import routes_section
from sdit.observe.report.scores import scores_section
from sdit.observe.report.setup import config_section, environment_section, topology_section
from sdit.observe.report.speed import speed_section
from sdit.observe.report.style import CSS

SECTIONS = {
    "loss": ("Loss", loss_section),
    "samples": ("Samples", samples_section),
    "scores": ("Scores", scores_section),
    "speed": ("Speed", speed_section),
    "experts": ("Experts", routes_section),
    "faults": ("Faults", faults_section),
    "checkpoints": ("Checkpoints", checkpoints_section),
    "data": ("Data", data_section),
    "topology": ("Topology", topology_section),
    "config": ("Config", config_section),
    "environment": ("Environment", environment_section),
}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the browser itself refuses every request


def build_page(runs: Sequence[RunRecord]) -> str:
    """The HTML of a report about one run or several."""
    built = {name: build(runs) for name, (_, build) in SECTIONS.items()}
    title = " · ".join(run.name for run in runs)
    links = [tag("a", SECTIONS[name][0], href=f"#{name}") for name, content in built.items() if content]
    top = tag(
        "div", tag("p", "sdit training report", class_="eyebrow"), tag("h1", title), tag("p", _subtitle(runs), class_="sub"),
        tag("nav", *links),
    )  # fmt: skip
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title} | sdit report"),
        tag("style", Html(CSS)),
    )
    main = tag("main", summary(runs), *built.values())
    footer = tag(
        "footer", f"Written by sdit {__version__}. This file is complete in itself and asks no server for anything."
    )
    body = tag("body", tag("header", top), main, footer)
    return str(join([Html("<!doctype html>\n"), tag("html", head, body, lang="en"), "\n"]))


def _subtitle(runs: Sequence[RunRecord]) -> str:
    """What was trained, for one run; how many there are, for several."""
    if len(runs) > 1:
        return f"{len(runs)} runs side by side"
    run = runs[0]
    model = {key: run.config.get(f"model.{key}") for key in ("variant", "depth", "width", "input_size", "channels")}
    names = {"switch": "Switch-DiT", "dit": "DiT", "dtr": "DTR"}
    words = [names.get(str(model["variant"]), "model unknown")]
    if all(is_number(model[key]) for key in ("depth", "width", "input_size", "channels")):
        words.append(f"{model['depth']} blocks of width {model['width']}")
        if model["variant"] == "switch" and "model.experts.count" in run.config:
            words.append(f"{run.config['model.experts.count']} experts, {run.config.get('model.experts.top_k')} used")
        words.append(f"images of {model['input_size']} x {model['input_size']} x {model['channels']}")
    state = run.last.get("images_seen")
    if is_number(state) and run.total_images and state < run.total_images:  # type: ignore[operator]
        words.append(f"{state / run.total_images:.0%} done")  # type: ignore[operator]
    return ", ".join(words)
