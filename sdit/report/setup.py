"""The report's sections on the setup of a run: data, ranks, config, environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from sdit.config import config_keys
from sdit.redact import redact
from sdit.report.elements import Card, Element, Grid, Section, Table, Text
from sdit.report.history import MAX_NAMES
from sdit.report.record import RunRecord
from sdit.report.values import is_number

SETS = (("data", "Training images", "data.path"), ("held_out_data", "Held-out images", "validation.path"))
MAX_GROUPS = 16  # that are listed individually
IN_OTHER_SECTIONS = (
    "ranks", "ranks_found_by", "device", "expert_parallel", "micro_batch", "accumulation", "data", "held_out_data",
    "sample_rows",
)  # fmt: skip


def data_section(runs: Sequence[RunRecord]) -> Section:
    """Return a card for each data set of each run, as recorded at the last start."""
    cards = []
    for number, run in enumerate(runs):
        for name, title, key in SETS:
            data = run.environment.get(name)
            if isinstance(data, Mapping):
                cards.append(Card(title, _data(run, data, key), number))
    return Section("data", "Data", "Data", [Grid(cards)] if cards else [])


def _data(run: RunRecord, data: Mapping[str, object], key: str) -> list[Element]:
    is_embedded = key == "data.path" and run.config.get("data.source") == "digits"
    facts = {
        "where": "the embedded digits" if is_embedded else redact(str(run.config.get(key, "—"))),
        "samples": f"{data.get('total', '?')} {data.get('kind', '')}",
        "classes": data.get("classes", "?"),
        "fingerprint": str(data.get("fingerprint", "—"))[:16],
    }
    elements: list[Element] = [Table(list(facts.items()))]
    names = data.get("class_names")
    if isinstance(names, list) and names:
        elements.append(Table(list(enumerate(names[:MAX_NAMES])), ("label", "class"), summary="class names"))
        elements += [Text(f"and {len(names) - MAX_NAMES} more")] if len(names) > MAX_NAMES else []
    return elements


def topology_section(runs: Sequence[RunRecord]) -> Section:
    """Return the ranks with their groups, and the division of the batch."""
    cards = []
    for number, run in enumerate(runs):
        facts = _facts(run)
        if facts:
            cards.append(Card("Ranks", [Table(list(facts.items()))], number))
    return Section("topology", "Topology", "Topology", [Grid(cards)] if cards else [])


def _facts(run: RunRecord) -> dict[str, object]:
    environment, zero = run.environment, run.deepspeed.get("zero_optimization")
    ranks, micro, times = (environment.get(key) for key in ("ranks", "micro_batch", "accumulation"))
    facts: dict[str, object] = {}
    if is_number(ranks):
        facts["ranks"] = f"{ranks}, found by {environment.get('ranks_found_by', '?')}"
        facts["device"] = environment.get("device", "?")
        facts |= {"experts": groups} if (groups := _groups(environment)) else {}
    if is_number(micro) and is_number(times) and is_number(ranks):
        product = int(ranks * micro * times)
        facts["global batch"] = f"{product} = {ranks} ranks x {micro} images x {times} micro-step{'s' * (times != 1)}"
    if isinstance(zero, Mapping):
        facts["ZeRO stage"] = zero.get("stage", 0)
    for key in ("train.precision", "parallel.exchange", "parallel.placement", "parallel.seating"):
        if key in run.config:
            facts[key.partition(".")[2]] = _shown(run.config[key])
    decisions = [str(event.get("text", "")) for event in run.events if event.get("event") == "experts"]
    return facts | ({"last decision on experts": decisions[-1]} if decisions else {})


def _groups(environment: Mapping[str, Any]) -> str:
    """Return the expert-parallel groups, which are consecutive ranks. Empty if the file does not contain them."""
    ranks, size = environment.get("ranks"), environment.get("expert_parallel")
    if not isinstance(ranks, int) or not isinstance(size, int) or not 1 <= size <= ranks:
        return ""
    if size == 1:
        return "each rank has all experts"
    groups = [f"{first} to {min(first + size, ranks) - 1}" for first in range(0, ranks, size)]
    return f"shared by ranks {', '.join(groups[:MAX_GROUPS])}{', ...' if len(groups) > MAX_GROUPS else ''}"


def config_section(runs: Sequence[RunRecord]) -> Section:
    """Return the keys that differ from the defaults and between the runs, and a folded table of all keys."""
    defaults = {key: default for key, _, default in config_keys()}
    keys = list(dict.fromkeys([*defaults, *(key for run in runs for key in run.config)]))
    head = ["key", *([run.name for run in runs] if len(runs) > 1 else ["value"]), "default"]

    def table(shown: Sequence[str], summary: str = "") -> Table:
        return Table([_row(runs, key, defaults) for key in shown], head, "keys", summary)

    cards = []
    if len(runs) > 1:
        different = [key for key in keys if len({_shown(run.config.get(key)) for run in runs}) > 1 and key != "run_dir"]
        same = Text("The runs differ only in their folders.", "empty")
        cards.append(Card("Keys that differ between the runs", [table(different) if different else same]))
    set_keys = [key for key in keys if any(_is_set(run, key, defaults) for run in runs)]
    cards.append(Card("Keys that differ from the defaults", [table(set_keys), table(keys, f"all {len(keys)} keys")]))
    return Section("config", "Config", "Config", [Grid(cards, "wide")] if any(run.config for run in runs) else [])


def _is_set(run: RunRecord, key: str, defaults: Mapping[str, Any]) -> bool:
    return key in run.config and (key not in defaults or run.config[key] != defaults[key])


def _row(runs: Sequence[RunRecord], key: str, defaults: Mapping[str, Any]) -> list[object]:
    cells: list[object] = [key]
    for run in runs:
        text = _shown(run.config[key]) if key in run.config else "not in its config"
        cells.append(_cell(text, "set" if _is_set(run, key, defaults) else "same"))
    return [*cells, _cell(_shown(defaults[key]) if key in defaults else "unknown key", "same")]


def _cell(text: str, css: str) -> Markup:
    return Markup('<span class="{}">{}</span>').format(css, text)


def environment_section(runs: Sequence[RunRecord]) -> Section:
    """Return versions, command and machine."""
    values = [_flat(run.environment) for run in runs]
    names = list(dict.fromkeys(name for flat in values for name in flat))
    head = ["", *[run.name for run in runs]] if len(runs) > 1 else []
    table = Table([[name, *[flat.get(name, "—") for flat in values]] for name in names], head, "keys")
    grids = [Grid([Card("Recorded at the last start", [table])], "wide")] if names else []
    return Section("environment", "Environment", "Environment", grids)


def _flat(environment: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in environment.items():
        if name in IN_OTHER_SECTIONS:
            continue
        if isinstance(value, Mapping):
            found |= {str(key): _shown(item) for key, item in value.items()}
        else:
            found[name] = redact(" ".join(map(str, value))) if isinstance(value, list) else _shown(value)
    return found


def _shown(value: object) -> str:
    """Return a value as YAML writes it, without secrets."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else redact(str(value))
