"""Scores of a run's images, as evaluate left them in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdit.observe.report.html import Html, card, grid, section, table
from sdit.observe.report.numbers import is_number
from sdit.observe.report.record import RunRecord
from sdit.observe.report.shared import run_tag

SCORES = {"fid": "FID", "kid": "KID", "inception_score": "IS", "precision": "precision", "recall": "recall"}
NEEDED = 10_000  # images of each set, for files that do not say themselves what is biased
NOTE = (
    "* depends on the number of images: fewer than 10,000 drawn or of the reference (KID: 1,000). "
    "Compare such a score only with scores of the same numbers of images and the same reference."
)


def scores_section(runs: Sequence[RunRecord]) -> Html:
    """A table of each run's evaluations."""
    cards = []
    for number, run in enumerate(runs):
        if run.scores:
            rows = [_row(name, body) for name, body in run.scores.items()]
            is_marked = any("*" in cell for row in rows for cell in row)
            head = ("file", "images", "reference", "its images", *SCORES.values())
            note = NOTE if is_marked else ""
            cards.append(card("Against a reference", table(head, rows), note=note, run=run_tag(runs, number)))
    return section("scores", "Scores", grid(*cards, class_="grid wide") if cards else "")


def _row(name: str, body: dict[str, Any]) -> list[str]:
    reference = body.get("reference")
    reference = reference if isinstance(reference, dict) else {}
    drawn, held = body["images"].get("count"), reference.get("images")
    biased = body.get("biased")
    if not isinstance(biased, dict):  # written before evaluate said so
        is_few = any(count < NEEDED for count in (drawn, held) if isinstance(count, int))
        biased = dict.fromkeys(SCORES, "") if is_few else {}
    cells = [f"{body[key]:.4g}{'*' if key in biased else ''}" if is_number(body.get(key)) else "—" for key in SCORES]
    counts = [f"{count:,}" if is_number(count) else "—" for count in (drawn, held)]
    return [name, counts[0], str(reference.get("name", "—")), counts[1], *cells]
