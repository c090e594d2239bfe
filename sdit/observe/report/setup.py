"""How a run was set up: topology, config with what differs from the defaults, environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdit.configfile import config_keys
from sdit.observe.report.html import Html, card, grid, section, table, tag
from sdit.observe.report.numbers import is_number
from sdit.observe.report.record import RunRecord
from sdit.observe.report.shared import run_tag
from sdit.redact import redact

MAX_RANKS = 32  # drawn one by one
LAYOUT = ("ranks", "ranks_found_by", "device", "expert_parallel", "micro_batch", "accumulation")
DATA = ("data", "held_out_data", "sample_rows")


def topology_section(runs: Sequence[RunRecord]) -> Html:
    """Ranks in their groups, and what the batch is cut into."""
    cards = []
    for number, run in enumerate(runs):
        facts = _facts(run)
        if facts:
            lines = [(name, value) for name, value in facts.items()]
            cards.append(card("Ranks", _ranks(run), table((), lines), run=run_tag(runs, number)))
    return section("topology", "Topology", grid(*cards, class_="grid") if cards else "")


def _facts(run: RunRecord) -> dict[str, object]:
    environment, zero = run.environment, run.deepspeed.get("zero_optimization")
    ranks, micro, times = (environment.get(key) for key in ("ranks", "micro_batch", "accumulation"))
    facts: dict[str, object] = {}
    if is_number(ranks):
        facts["ranks"] = f"{ranks}, found by {environment.get('ranks_found_by', '?')}"
        facts["device"] = environment.get("device", "?")
    if is_number(micro) and is_number(times) and is_number(ranks):
        product = int(ranks * micro * times)  # type: ignore[operator]
        facts["global batch"] = f"{product} = {ranks} ranks x {micro} images x {times} micro-step{'s' * (times != 1)}"
    if isinstance(zero, Mapping):
        facts["ZeRO stage"] = zero.get("stage", 0)
    for key in ("train.precision", "parallel.exchange", "parallel.placement", "parallel.seating"):
        if key in run.config:
            facts[key.partition(".")[2]] = _shown(run.config[key])
    decisions = [str(event.get("text", "")) for event in run.events if event.get("event") == "experts"]
    if decisions:
        facts["last decision on experts"] = decisions[-1]
    return facts


def _ranks(run: RunRecord) -> Html | str:
    """Boxes of ranks, in expert-parallel groups of neighbours."""
    world, group = run.environment.get("ranks"), run.environment.get("expert_parallel")
    if not is_number(world) or not 1 <= world <= MAX_RANKS:  # type: ignore[operator]
        return ""
    size = int(group) if is_number(group) and group else 1  # type: ignore[arg-type]
    groups = []
    for first in range(0, int(world), size):  # type: ignore[arg-type]
        boxes = [tag("b", f"rank {rank}") for rank in range(first, min(first + size, int(world)))]  # type: ignore[arg-type]
        title = f"experts shared by {size}" if size > 1 else "all experts"
        groups.append(tag("div", tag("span", title), tag("div", *boxes), class_="group"))
    return tag("div", *groups, class_="ranks")


def config_section(runs: Sequence[RunRecord]) -> Html:
    """What differs from the defaults, and between the runs; all keys below."""
    if not any(run.config for run in runs):
        return Html("")
    defaults = {key: default for key, _, default in config_keys()}
    keys = list(dict.fromkeys([*defaults, *(key for run in runs for key in run.config)]))
    changed = [key for key in keys if any(key in run.changed() for run in runs)]
    head = ["key", *([run.name for run in runs] if len(runs) > 1 else ["value"]), "default"]
    parts: list[object] = []
    if len(runs) > 1:
        different = [key for key in keys if len({_shown(run.config.get(key)) for run in runs}) > 1 and key != "run_dir"]
        content = table(head, [_row(runs, key, defaults) for key in different], "keys") if different else ""
        title = "Where the runs differ"
        parts.append(card(title, content or tag("p", "nowhere but in their folders", class_="empty")))
    rows = [_row(runs, key, defaults) for key in changed]
    every = table(head, [_row(runs, key, defaults) for key in keys], "keys")
    details = tag("details", tag("summary", f"all {len(keys)} keys"), every)
    parts.append(card("What differs from the defaults", table(head, rows, "keys"), details))
    return section("config", "Config", grid(*parts, class_="grid wide"))


def _row(runs: Sequence[RunRecord], key: str, defaults: Mapping[str, Any]) -> list[object]:
    cells: list[object] = [key]
    for run in runs:
        if key not in run.config:
            cells.append(tag("span", "not in its config", class_="same"))
            continue
        is_set = key in run.changed()
        cells.append(tag("span", _shown(run.config[key]), class_="set" if is_set else "same"))
    return [*cells, tag("span", _shown(defaults[key]) if key in defaults else "unknown key", class_="same")]


def environment_section(runs: Sequence[RunRecord]) -> Html:
    """Versions, command, machine."""
    names: list[str] = []
    values = []
    for run in runs:
        flat = _flat(run.environment)
        values.append(flat)
        names += [name for name in flat if name not in names]
    if not names:
        return Html("")
    head = ["", *[run.name for run in runs]] if len(runs) > 1 else []
    rows = [[name, *[flat.get(name, "—") for flat in values]] for name in names]
    return section(
        "environment",
        "Environment",
        grid(card("As the last start found it", table(head, rows, "keys")), class_="grid wide"),
    )


def _flat(environment: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in environment.items():
        if name in LAYOUT + DATA:  # in sections of their own
            continue
        if isinstance(value, Mapping):
            found |= {str(key): _shown(part) for key, part in value.items()}
        else:
            found[name] = redact(" ".join(map(str, value))) if isinstance(value, list) else _shown(value)
    return found


def _shown(value: object) -> str:
    """A value as YAML writes it, without secrets."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else redact(str(value))
