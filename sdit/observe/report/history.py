"""What came of a run: its state in a few numbers, samples over time, checkpoints, and what it survived."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdit.observe.report.data import grid_rows
from sdit.observe.report.html import Html, card, escape, grid, join, section, table, tag
from sdit.observe.report.images import file_uri
from sdit.observe.report.numbers import curve, is_number, rough, seconds, short, size
from sdit.observe.report.record import RunRecord
from sdit.observe.report.shared import colour_of, run_tag
from sdit.observe.report.speed import speed_of, time_parts
from sdit.observe.routing_pictures import evenly

GRIDS = 6
GRIDS_BYTES = 2_000_000  # of all runs together
ROWS = 40  # of a table; the rest is counted
QUIET = ("checkpoint", "experts")  # events that are no faults


def summary(runs: Sequence[RunRecord]) -> Html:
    """A row of figures per run, and what its folder lacks."""
    parts: list[object] = []
    for number, run in enumerate(runs):
        if len(runs) > 1:
            dot = tag("i", style=f"background:var(--{colour_of(number)})")
            parts.append(tag("p", dot, run.name, _state(run), class_="run-name"))
        parts.append(tag("div", *_tiles(run), class_="tiles"))
        if run.ended_early:
            parts.append(tag("p", tag("b", "Not complete: "), run.ended_early, class_="hint"))
        if run.missing:
            parts.append(tag("p", tag("b", "Not in this report: "), "; ".join(run.missing), class_="hint"))
    return tag("section", *parts, id="summary")


def _state(run: RunRecord) -> Html:
    """A badge: finished, or how far the run came."""
    images, total = run.last.get("images_seen"), run.total_images
    if not is_number(images):
        return tag("span", "no steps logged", class_="badge warn")
    if total and images >= total:  # type: ignore[operator]
        return tag("span", "finished", class_="badge good")
    return tag("span", f"{images / total:.0%} done" if total else "length unknown", class_="badge plain")  # type: ignore[operator]


def _tiles(run: RunRecord) -> list[Html]:
    images, total = run.last.get("images_seen"), run.total_images
    tiles = [
        _tile("images seen", short(images) if is_number(images) else "—", f"of {short(total)}" if total else ""),  # type: ignore[arg-type]
        _tile("training loss", _recent(run, "loss"), "last tenth of the run"),
    ]
    _, held_out = curve(run.metrics, "validation_loss")
    if held_out:
        tiles.append(_tile("held-out loss", short(held_out[-1]), f"best {short(min(held_out))}"))
    spent = sum(amount for _, amount, _ in time_parts(run))
    tiles.append(_tile("images per second", speed_of(run), "second half of the run"))
    tiles.append(_tile("time in the loop", rough(spent) if spent else "—", "rank 0"))
    kept = [checkpoint for checkpoint in run.checkpoints if checkpoint.bytes is not None]
    tiles.append(
        _tile("checkpoints", str(len(run.checkpoints)), f"{len(kept)} kept, {size(sum(c.bytes or 0 for c in kept))}")
    )
    skipped, failed = run.count("skipped_step"), run.count("checkpoint_failed")
    words = [f"{skipped} skipped step{'s' * (skipped != 1)}"]
    words += [f"{failed} failed checkpoint{'s' * (failed != 1)}"] if failed else []
    tiles.append(_tile("restarts", str(run.restarts), ", ".join(words)))
    return tiles


def _tile(name: str, value: str, detail: str) -> Html:
    return tag("div", tag("span", name), tag("b", value), tag("small", detail) if detail else "", class_="tile")


def _recent(run: RunRecord, key: str) -> str:
    _, values = curve(run.metrics, key)
    recent = values[-max(1, len(values) // 10) :]
    return short(sum(recent) / len(recent)) if recent else "—"


def samples_section(runs: Sequence[RunRecord]) -> Html:
    """Up to GRIDS grids of each run, evenly over training."""
    number_of_grids = sum(min(GRIDS, len(run.samples)) for run in runs)
    cards = []
    for number, run in enumerate(runs):
        figures = []
        for path in evenly(run.samples, GRIDS):
            uri = file_uri(path, GRIDS_BYTES // max(1, number_of_grids))
            if uri is None:
                run.missing.append(f"samples/{path.name}: no picture")
                continue
            caption = f"{int(path.stem[7:]):,} images" if path.stem[7:].isdecimal() else path.stem
            image = tag("img", src=uri, alt=f"samples after {caption}", loading="lazy")
            figures.append(tag("figure", image, tag("figcaption", caption)))
        if figures:
            note = (
                f"{len(figures)} of {len(run.samples)} grids; a row is a class, noise and labels are the same in all."
            )
            if run.shows_latents:
                note += " Not pictures: three channels of latents, which no VAE decoded."
            frames = tag("div", *figures, class_="frames" if len(runs) > 1 else "frames big")
            rows = grid_rows(run)
            note += f" Rows from the top: {rows}." if rows else ""
            cards.append(card("Drawn from the averaged weights", frames, note=note, run=run_tag(runs, number)))
    return section(
        "samples", "Samples over time", grid(*cards, class_="grid" if len(runs) > 1 else "grid wide") if cards else ""
    )


def checkpoints_section(runs: Sequence[RunRecord]) -> Html:
    """A table of each run's checkpoints, newest first."""
    cards = []
    for number, run in enumerate(runs):
        if not run.checkpoints and not run.aside:
            continue
        lines = [
            (
                f"{checkpoint.images_seen:,}",
                "—" if checkpoint.step is None else f"{checkpoint.step:,}",
                "—" if checkpoint.seconds is None else seconds(checkpoint.seconds),
                "removed" if checkpoint.bytes is None else size(checkpoint.bytes),
                checkpoint.written or "—",
            )
            for checkpoint in reversed(run.checkpoints)
        ]
        lines += [
            (checkpoint.name, "—", "put aside", size(checkpoint.bytes or 0), checkpoint.written or "—")
            for checkpoint in reversed(run.aside)
        ]
        content = _capped(("images", "step", "write", "size", "written"), lines)
        cards.append(card("Checkpoints", content, run=run_tag(runs, number)))
    return section("checkpoints", "Checkpoints", grid(*cards, class_=_layout(runs)) if cards else "")


def faults_section(runs: Sequence[RunRecord]) -> Html:
    """What went wrong and what became of it."""
    cards = []
    for number, run in enumerate(runs):
        lines = [_event(run, event) for event in run.events if event.get("event") not in QUIET]
        content: list[object] = [
            _capped(("when (UTC)", "step", "what", ""), lines) if lines else tag("p", "no events", class_="empty")
        ]
        ended = [attempt for attempt in run.attempts if attempt.get("text")]
        if ended:
            content.append(tag("h3", "Attempts that ended early"))
            attempts = [(_when(end), end.get("attempt", "—"), _end(end), end["text"]) for end in ended]
            content.append(_capped(("when (UTC)", "attempt", "outcome", ""), attempts))
        bad = run.last.get("bad_samples")
        if is_number(bad) and bad:
            content.append(tag("p", f"{bad:.0f} unreadable samples were replaced in the last epoch.", class_="note"))
        cards.append(card("Starts and faults", *content, run=run_tag(runs, number)))
    return section("faults", "Faults survived", grid(*cards, class_=_layout(runs)))


def _event(run: RunRecord, event: Mapping[str, object]) -> tuple[object, ...]:
    kind = str(event.get("event", "?"))
    name = kind.replace("_", " ")
    if kind == "start":
        name, colour = ("start", "good") if event is run.events[0] else ("restart", "bad")
    else:
        colour = "warn"
    step = event.get("step")
    lines = [escape(line) for line in str(event.get("text", "")).splitlines()]
    return (
        _when(event),
        step if is_number(step) else "—",
        tag("span", name, class_=f"badge {colour}"),
        join(lines, "<br>"),
    )


def _when(record: Mapping[str, object]) -> str:
    """Date and time to the minute; runs of older versions did not keep it."""
    return str(record.get("time", "—"))[:16].replace("T", " ")


def _end(attempt: Mapping[str, object]) -> Html:
    if attempt.get("restart"):
        return tag("span", "restarted", class_="badge good")
    return tag("span", f"ended, exit {attempt.get('exit_code', '?')}", class_="badge bad")


def _capped(head: Sequence[str], lines: Sequence[Sequence[object]]) -> Html:
    shown = table(head, lines[:ROWS])
    if len(lines) <= ROWS:
        return shown
    more = table(head, lines[ROWS : 10 * ROWS])
    summary_line = tag("summary", f"{len(lines) - ROWS} more")
    cut = (
        tag("p", f"and {len(lines) - 10 * ROWS} that are only in the files", class_="note")
        if len(lines) > 10 * ROWS
        else ""
    )
    return join([shown, tag("details", summary_line, more, cut)])


def _layout(runs: Sequence[RunRecord]) -> str:
    return "grid" if len(runs) > 1 else "grid wide"
