"""Reads the folder of a run for the report. Missing or damaged files are listed, and the others are used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sdit.config import flatten, read_yaml
from sdit.errors import ConfigError
from sdit.observe.metrics_file import read_records
from sdit.observe.routing import Snapshot, evenly, read_snapshots, snapshot_files
from sdit.observe.token_maps import TokenMap, read_token_maps, token_map_files
from sdit.report.values import is_number
from sdit.supervise.unfinished import last_launch

FILES = ("config.yaml", "environment.json", "metrics.jsonl", "events.jsonl")
MAX_SNAPSHOTS = 24
_SAVED = re.compile(r"(images-\d+) in ([\d.]+) s")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint. `bytes` and `written` are None if retention has removed it."""

    name: str
    images_seen: int
    step: int | None = None
    seconds: float | None = None
    bytes: int | None = None
    written: str | None = None


@dataclass(eq=False)
class RunRecord:
    """The data of a run for the report.

    Values are used as the files contain them, so any value may be missing or have a wrong type.
    """

    folder: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)  # dotted key -> value
    environment: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    aside: list[Checkpoint] = field(default_factory=list)  # set aside because a start continued from an earlier point
    samples: list[Path] = field(default_factory=list)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)  # file name -> result of evaluate
    routing: list[Snapshot] = field(default_factory=list)
    token_maps: list[TokenMap] = field(default_factory=list)
    maps: list[Path] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    ended_early: str = ""  # the end of the last launch, if the run is not complete

    @property
    def last(self) -> dict[str, Any]:
        """The last logged step, empty if there is none."""
        return self.metrics[-1] if self.metrics else {}

    @property
    def total_images(self) -> int | None:
        """The length of the run: the one fixed at its start, else the one in its config."""
        fixed = self.environment.get("length_images")
        if is_number(fixed):
            return int(fixed)
        images, steps, batch = (self.config.get(f"train.{key}") for key in ("images", "steps", "global_batch"))
        if is_number(images):
            return int(images)
        return int(steps * batch) if is_number(steps) and is_number(batch) else None

    def count(self, event: str) -> int:
        """Return the number of events of a kind."""
        return sum(record.get("event") == event for record in self.events)

    @property
    def shows_latents(self) -> bool:
        """True if the grids show latent channels, because older versions drew latents as images."""
        return self.config.get("model.channels") not in (None, 1, 3) and not self.config.get("sample.vae")

    @property
    def restarts(self) -> int:
        """The number of restarts of the run, by its supervisor or by a user."""
        return max(0, self.count("start") - 1)


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read the runs.

    Raises: ConfigError: if a folder does not hold a run.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{folder.resolve().parent.name}/{folder.resolve().name}" for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{number}: {name}" for number, name in enumerate(names, start=1)]
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read_run(folder: Path, name: str) -> RunRecord:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is not a folder; legal: the folder of a run (sdit train --run-dir)")
    if not any((folder / file).exists() for file in FILES):
        raise ConfigError(f"{folder}: holds none of {', '.join(FILES)}; legal: the folder of a run")
    run = RunRecord(folder, name)
    values = _try(run, "config.yaml", read_yaml)
    if values == {}:
        run.missing.append("config.yaml: empty")
    run.config = flatten(values or {})
    run.environment = _try(run, "environment.json", _json) or {}
    run.deepspeed = _try(run, "deepspeed.json", _json) or {}
    run.metrics = [record for record in _records(run, "metrics.jsonl") if is_number(record.get("images_seen"))]
    run.events = _records(run, "events.jsonl")
    if (folder / "logs" / "attempts.jsonl").exists():
        run.attempts = _records(run, "logs/attempts.jsonl")
    ended = last_launch(folder)
    run.ended_early = ended.describe(folder) if ended is not None else ""
    run.checkpoints = _checkpoints(run)
    run.aside = [_stored(path) for path in sorted((folder / "checkpoints").glob("aside-images-*")) if path.is_dir()]
    run.samples = sorted((folder / "samples").glob("images-*.png"))
    run.scores = _scores(run)
    run.maps = sorted((folder / "routing").glob("images-*.png"))
    if not run.samples:
        has_latents = any((folder / "samples").glob("latents-*.npz"))
        run.missing.append(f"samples/: {'only latents; sample.vae decodes them' if has_latents else 'no sample grid'}")
    _read_routing(run)
    return run


def _try(run: RunRecord, name: str, read: Callable[[Path], Any]) -> Any:
    path = run.folder / name
    if not path.is_file():
        run.missing.append(f"{name}: {'not a regular file' if path.exists() else 'missing'}")
        return None
    try:
        return read(path)
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        run.missing.append(f"{name}: unreadable ({' '.join(str(error).split())[:200]})")
        return None


def _json(path: Path) -> dict[str, Any]:
    body = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(body, dict):
        raise ValueError("no JSON object")
    return body


def _scores(run: RunRecord) -> dict[str, dict[str, Any]]:
    """Return the results of `sdit evaluate` in the run's folder and in its subfolder `scores`, by name."""
    found = {}
    for path in sorted([*run.folder.glob("*.json"), *run.folder.glob("scores/*.json")]):
        name = str(path.relative_to(run.folder))
        body = {} if name in FILES or name == "deepspeed.json" else _try(run, name, _json) or {}
        if is_number(body.get("fid")) and isinstance(body.get("images"), dict):
            found[name] = body
    return found


def _records(run: RunRecord, name: str) -> list[dict[str, Any]]:
    records, damaged = _try(run, name, read_records) or ([], 0)
    if damaged:
        run.missing.append(f"{name}: {damaged} damaged line{'s' if damaged > 1 else ''} ignored")
    elif not records and (run.folder / name).exists():
        run.missing.append(f"{name}: empty")
    return records


def _checkpoints(run: RunRecord) -> list[Checkpoint]:
    """Return the checkpoints of the events and those in the folder.

    The sizes come from the folder, the write times from the events.
    """
    found: dict[str, Checkpoint] = {}
    for event in run.events:
        match = _SAVED.match(str(event.get("text", ""))) if event.get("event") == "checkpoint" else None
        if match:
            step = event.get("step")
            number = int(match[1].removeprefix("images-"))
            found[match[1]] = Checkpoint(match[1], number, int(step) if is_number(step) else None, float(match[2]))
    for folder in sorted((run.folder / "checkpoints").glob("images-*")):
        if not (folder / "manifest.json").is_file():
            run.missing.append(f"checkpoints/{folder.name}: no manifest")
            continue
        before = found.get(folder.name, Checkpoint(folder.name, 0))
        found[folder.name] = replace(_stored(folder), step=before.step, seconds=before.seconds)
    return sorted(found.values(), key=lambda checkpoint: checkpoint.images_seen)


def _stored(folder: Path) -> Checkpoint:
    """Return the checkpoint that is stored in a folder."""
    files = [path.stat() for path in folder.iterdir() if path.is_file()]
    written = datetime.fromtimestamp(max((file.st_mtime for file in files), default=0.0), tz=UTC)
    number = folder.name.rpartition("-")[2]
    return Checkpoint(
        folder.name, int(number) if number.isdecimal() else 0, bytes=sum(file.st_size for file in files),
        written=written.strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip


def _read_routing(run: RunRecord) -> None:
    """Read the maps of gates and of token-routed experts, evenly spaced over the run."""

    def report(text: str) -> None:
        run.missing.append(text.removeprefix(f"{run.folder}/"))

    folder = run.folder / "routing"
    run.routing = read_snapshots(evenly(snapshot_files(folder), MAX_SNAPSHOTS), report)
    run.token_maps = read_token_maps(evenly(token_map_files(folder), MAX_SNAPSHOTS), report)
    has_gates = run.config.get("model.variant", "switch") == "switch"
    if not run.routing and has_gates:
        run.missing.append("routing/: no snapshots of the gates" + (", only images of maps" if run.maps else ""))
    if not run.token_maps and "model.moe.experts" in run.config:
        run.missing.append("routing/: no maps of token-routed experts")
