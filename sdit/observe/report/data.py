"""The images that a run was trained on: where they are, how many, their classes, their fingerprint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdit.observe.report.html import Html, card, grid, section, table, tag
from sdit.observe.report.record import RunRecord
from sdit.observe.report.shared import run_tag
from sdit.redact import redact

MAX_NAMES = 1000  # of one data set
SETS = (("data", "Training images", "data.path"), ("held_out_data", "Held-out images", "validation.path"))


def data_section(runs: Sequence[RunRecord]) -> Html:
    """A card for each data set of each run, as the last start found them."""
    cards = []
    for number, run in enumerate(runs):
        for name, title, key in SETS:
            data = run.environment.get(name)
            if isinstance(data, Mapping):
                cards.append(card(title, *_content(run, data, key), run=run_tag(runs, number)))
    return section("data", "Data", grid(*cards, class_="grid") if cards else "")


def grid_rows(run: RunRecord) -> str:
    """The classes of the sample grid's rows, such as `0 (cat), 1 (dog)`; empty if the run's folder does not say."""
    rows = run.environment.get("sample_rows")
    return ", ".join(map(str, rows[:MAX_NAMES])) if isinstance(rows, list) else ""


def _content(run: RunRecord, data: Mapping[str, object], key: str) -> list[object]:
    is_embedded = key == "data.path" and run.config.get("data.source") == "digits"
    facts = {
        "where": "the embedded digits" if is_embedded else redact(str(run.config.get(key, "—"))),
        "samples": f"{data.get('total', '?')} {data.get('kind', '')}",
        "classes": data.get("classes", "?"),
        "fingerprint": str(data.get("fingerprint", "—"))[:16],
    }
    parts: list[object] = [table((), list(facts.items()))]
    names = data.get("class_names")
    if isinstance(names, list) and names:
        lines = [(label, str(name)) for label, name in enumerate(names[:MAX_NAMES])]
        more = tag("p", f"and {len(names) - MAX_NAMES} more", class_="note") if len(names) > MAX_NAMES else ""
        parts.append(tag("details", tag("summary", "class names"), table(("label", "class"), lines), more))
    return parts
