"""The report's sections on the history of a run: state, samples, evaluations, checkpoints, starts and faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from sdit.observe.routing import evenly
from sdit.report.elements import Card, Element, Frames, Section, Table, Text, badge, list_grid
from sdit.report.images import file_uri
from sdit.report.record import RunRecord
from sdit.report.speed import speed_of, time_by_task
from sdit.report.values import curve, is_number, mean, seconds, short, size

GRIDS = 6
GRIDS_BYTES = 2_000_000  # of all runs together
MAX_NAMES = 1000  # classes that are named
QUIET = ("checkpoint", "experts")  # events that are not faults
SCORES = {"fid": "FID", "kid": "KID", "inception_score": "IS", "precision": "precision", "recall": "recall"}
NEEDED = 10_000  # images of each set, for files without the field `biased`
BIASED = (
    "* depends on the number of images: fewer than 10,000 sampled images or reference images (KID: 1,000). "
    "Compare such a score only with scores of the same numbers of images and the same reference."
)


def state_of(run: RunRecord) -> Markup:
    """Return a badge: finished, or the percentage done."""
    images, total = run.last.get("images_seen"), run.total_images
    if not is_number(images):
        return badge("no steps logged", "warn")
    if total and images >= total:
        return badge("finished", "good")
    return badge(f"{images / total:.0%} done" if total else "length unknown", "plain")


def tiles_of(run: RunRecord) -> list[tuple[str, str, str]]:
    """Return the summary of a run: (name, value, detail)."""
    images, total = run.last.get("images_seen"), run.total_images
    losses, held_out = curve(run.metrics, "loss")[1], curve(run.metrics, "validation_loss")[1]
    loss = mean(losses[-max(1, len(losses) // 10) :])
    spent = sum(amount for _, amount, _ in time_by_task(run))
    kept = [checkpoint.bytes for checkpoint in run.checkpoints if checkpoint.bytes is not None]
    skipped, failed = run.count("skipped_step"), run.count("checkpoint_failed")
    faults = f"{skipped} skipped step{'s' * (skipped != 1)}"
    faults += f", {failed} failed checkpoint{'s' * (failed != 1)}" if failed else ""
    tiles = [
        ("images seen", short(images) if is_number(images) else "—", f"of {short(total)}" if total else ""),
        ("training loss", "—" if loss is None else short(loss), "last tenth of the run"),
        ("images per second", speed_of(run), "second half of the run"),
        ("time in the loop", seconds(spent) if spent else "—", "rank 0"),
        ("checkpoints", str(len(run.checkpoints)), f"{len(kept)} kept, {size(sum(kept))}"),
        ("restarts", str(run.restarts), faults),
    ]
    if held_out:
        tiles.insert(2, ("held-out loss", short(held_out[-1]), f"best {short(min(held_out))}"))
    return tiles


def samples_section(runs: Sequence[RunRecord]) -> Section:
    """Return up to GRIDS grids of each run, evenly spaced. A file that is not an image is listed as missing."""
    number_of_grids = sum(min(GRIDS, len(run.samples)) for run in runs)
    cards = []
    for number, run in enumerate(runs):
        frames = []
        for path in evenly(run.samples, GRIDS):
            uri = file_uri(path, GRIDS_BYTES // number_of_grids)
            if uri is None:
                run.missing.append(f"samples/{path.name}: not an image")
                continue
            caption = f"{int(path.stem[7:]):,} images" if path.stem[7:].isdecimal() else path.stem
            frames.append((caption, [(uri, f"samples after {caption}")]))
        if frames:
            note = f"{len(frames)} of {len(run.samples)} grids. Each row is one class. All grids have the same noise and labels."
            if run.shows_latents:
                note += " The images show three channels of latents that were not decoded."
            rows = run.environment.get("sample_rows")
            if isinstance(rows, list) and rows:
                note += f" Rows from the top: {', '.join(map(str, rows[:MAX_NAMES]))}."
            cards.append(Card("Sampled from the averaged weights", [Frames(frames), Text(note)], number))
    return Section("samples", "Samples", "Samples over time", list_grid(runs, cards))


def scores_section(runs: Sequence[RunRecord]) -> Section:
    """Return a table of the evaluations of each run."""
    cards = []
    for number, run in enumerate(runs):
        rows = [_score(name, body) for name, body in run.scores.items()]
        notes = [Text(BIASED)] if any("*" in cell for row in rows for cell in row) else []
        head = ("file", "images", "reference", "its images", *SCORES.values())
        cards += [Card("Against a reference", [Table(rows, head), *notes], number)] if rows else []
    return Section("scores", "Scores", "Scores", list_grid(runs[:1], cards))


def _score(name: str, body: dict[str, Any]) -> list[str]:
    reference = body.get("reference")
    reference = reference if isinstance(reference, dict) else {}
    sampled, in_reference = body["images"].get("count"), reference.get("images")
    biased = body.get("biased")
    if not isinstance(biased, dict):  # the file was written by an older version
        is_few = any(count < NEEDED for count in (sampled, in_reference) if isinstance(count, int))
        biased = dict.fromkeys(SCORES, "") if is_few else {}
    cells = [f"{body[key]:.4g}{'*' if key in biased else ''}" if is_number(body.get(key)) else "—" for key in SCORES]
    counts = [f"{count:,}" if is_number(count) else "—" for count in (sampled, in_reference)]
    sampling = body.get("drawn")
    precision = sampling.get("precision", "fp32") if isinstance(sampling, dict) else "fp32"  # old results name none
    counts[0] += "" if precision == "fp32" else f" in {precision}"
    return [name, counts[0], str(reference.get("name", "—")), counts[1], *cells]


def checkpoints_section(runs: Sequence[RunRecord]) -> Section:
    """Return a table of the checkpoints of each run, newest first."""
    cards = []
    for number, run in enumerate(runs):
        rows = [
            (
                f"{checkpoint.images_seen:,}",
                "—" if checkpoint.step is None else f"{checkpoint.step:,}",
                "—" if checkpoint.seconds is None else seconds(checkpoint.seconds),
                "removed" if checkpoint.bytes is None else size(checkpoint.bytes),
                checkpoint.written or "—",
            )
            for checkpoint in reversed(run.checkpoints)
        ]
        rows += [
            (checkpoint.name, "—", "set aside", size(checkpoint.bytes or 0), checkpoint.written or "—")
            for checkpoint in reversed(run.aside)
        ]
        head = ("images", "step", "write", "size", "written")
        cards += [Card("Checkpoints", [Table(rows, head)], number)] if rows else []
    return Section("checkpoints", "Checkpoints", "Checkpoints", list_grid(runs, cards))


def faults_section(runs: Sequence[RunRecord]) -> Section:
    """Return the faults of each run and the actions after them."""
    cards = []
    for number, run in enumerate(runs):
        rows = [_event(run, event) for event in run.events if event.get("event") not in QUIET]
        elements: list[Element] = [
            Table(rows, ("when (UTC)", "step", "what", "")) if rows else Text("no events", "empty")
        ]
        ended = [
            (_when(end), end.get("attempt", "—"), _end(end), end["text"]) for end in run.attempts if end.get("text")
        ]
        if ended:
            table = Table(ended, ("when (UTC)", "attempt", "outcome", ""))
            elements += [Text("Attempts that ended early", "h3"), table]
        bad = run.last.get("bad_samples")
        if is_number(bad) and bad:
            elements.append(Text(f"{bad:.0f} unreadable samples were replaced in the last epoch."))
        cards.append(Card("Starts and faults", elements, number))
    return Section("faults", "Faults", "Faults and restarts", list_grid(runs, cards))


def _event(run: RunRecord, event: Mapping[str, object]) -> tuple[object, ...]:
    name, kind = str(event.get("event", "?")).replace("_", " "), "warn"
    if name == "start":
        name, kind = ("start", "good") if event is run.events[0] else ("restart", "bad")
    step, text = event.get("step"), str(event.get("text", ""))
    lines = Markup("<br>").join(text.splitlines())
    return _when(event), step if is_number(step) else "—", badge(name, kind), lines


def _when(record: Mapping[str, object]) -> str:
    """Return date and time to the minute. Older versions did not store it."""
    return str(record.get("time", "—"))[:16].replace("T", " ")


def _end(attempt: Mapping[str, object]) -> Markup:
    if attempt.get("restart"):
        return badge("restarted", "good")
    return badge(f"ended, exit {attempt.get('exit_code', '?')}", "bad")
