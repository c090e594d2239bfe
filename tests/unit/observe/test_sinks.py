"""Optional sinks get the run's numbers, and cannot stop it."""

from __future__ import annotations

import importlib.util
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdit.clock import Clock
from sdit.config import Config, ObserveConfig
from sdit.errors import CheckpointError, ConfigError
from sdit.launch_environment import RankInfo
from sdit.observe.observers import build_observers
from sdit.observe.sinks import MAX_SERIES, TensorBoard, WeightsAndBiases, require_packages, scalars
from sdit.train.events import Observer, Observers, OnFailure
from sdit.train.record import StepRecord, Validation

RECORD = StepRecord(
    step=2, images_seen=128, loss=0.5, loss_by_timestep=[0.1, None, 0.3], memory_bytes={"resident": 7}, slowest_rank=1
)


class Broken(Observer):
    """Fails whenever it is told of a step."""

    def __init__(self) -> None:
        self.calls = 0

    def on_step(self, clock: Clock, record: StepRecord) -> None:
        self.calls += 1
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("on_failure", "calls"), [(OnFailure.DROP, 1), (OnFailure.RETRY, 3)])
def test_an_observer_that_fails_is_logged_and_the_run_continues(
    on_failure: OnFailure, calls: int, caplog: pytest.LogCaptureFixture
) -> None:
    broken, other = Broken(), Broken()
    broken.name, broken.on_failure = "the sink", on_failure
    other.on_failure = OnFailure.RETRY  # an observer after it is called all the same
    observers = Observers([broken, other])
    observers.on_start(Clock(), 1, "fresh")
    for step in range(3):
        observers.on_step(Clock(), StepRecord(step=step, images_seen=step))
    observers.close()
    assert (broken.calls, other.calls) == (calls, 3)
    assert [record.message for record in caplog.records].count(
        "the sink failed (OSError: [Errno 28] No space left on device); training continues"
        + (" without it" if on_failure is OnFailure.DROP else "")
    ) == calls


def test_an_observer_that_the_run_needs_ends_it() -> None:
    with pytest.raises(OSError, match="No space left"):
        Observers([Broken()]).on_step(Clock(), StepRecord(step=1, images_seen=1))


def test_an_observer_that_cannot_be_closed_replaces_no_error_of_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """A full disk fails the last checkpoint, and then the file of an observer: the run ends with the checkpoint's error."""

    class Unflushed(Observer):
        name = "the file"

        def close(self) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="checkpoint not written"):
        try:
            raise CheckpointError("checkpoint not written")
        finally:
            Observers([Unflushed()]).close()
    assert "the file failed while it was closed (OSError: [Errno 28] No space left on device)" in caplog.text


@pytest.mark.parametrize(
    ("values", "package", "key"),
    [
        ({"tensorboard": True}, "tensorboardX", "observe.tensorboard: true"),
        ({"wandb": "offline"}, "wandb", "observe.wandb: offline"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], package: str, key: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("sdit.observe.sinks.find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(ConfigError, match=rf"^{key} needs the package {package}: pip install sdit\[observe\]"):
        require_packages(ObserveConfig.model_validate(values))
    require_packages(ObserveConfig())


def test_names_of_scalars_say_key_and_part() -> None:
    expected = {
        "step": 2,
        "images_seen": 128,
        "loss": 0.5,
        "loss_by_timestep/00": 0.1,
        "loss_by_timestep/02": 0.3,
        "memory_bytes/resident": 7,
        "slowest_rank": 1,
    }
    assert dict(scalars(RECORD.as_dict())) == expected
    assert dict(scalars({"expert_load": [[0.5] * MAX_SERIES] * 2, "loss": 1.0})) == {"loss": 1.0}


def test_only_the_first_rank_has_sinks(tmp_path: Path) -> None:
    config = Config.model_validate({"observe": {"tensorboard": False}, "run_dir": str(tmp_path)})
    page = Observer()
    for rank in (0, 1):
        info = RankInfo(rank=rank, world=2, local_rank=rank, local_world=2, source="test")
        observers = build_observers(config, tmp_path, info, page)
        try:
            kinds = [type(each).__name__ for each in observers.called]
            assert kinds[:2] == ["RankLog", "Observer"][: 1 + (rank == 0)]
            assert ("MetricsFile" in kinds) == (rank == 0)
        finally:
            observers.close()


def event_records(folder: Path) -> list[bytes]:
    """The records of all event files: length, its checksum, body, its checksum."""
    records = []
    for path in sorted(folder.iterdir()):
        body, place = path.read_bytes(), 0
        while place < len(body):
            (length,) = struct.unpack_from("<Q", body, place)
            records.append(body[place + 12 : place + 12 + length])
            place += 12 + length + 4
    return records


def test_tensorboard_gets_scalars_and_grids_over_images_seen(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    sink = TensorBoard(tmp_path)
    sink.on_start(Clock(64, 1), 256, "fresh")
    sink.on_step(Clock(128, 2), replace(RECORD, logged=True))
    sink.on_step(Clock(192, 3), RECORD)
    sink.on_samples(Clock(256, 4), np.zeros((2, 1, 8, 8), np.float32), np.array([0, 1]), 2)
    sink.close()
    found = {}
    for record in event_records(tmp_path / "tensorboard"):
        event = Event.FromString(record)
        found |= {(value.tag, event.step): value for value in event.summary.value}
    assert found[("loss", 128)].simple_value == 0.5
    assert found[("samples", 256)].image.width == 2 * 50 + 2
    assert not [step for _, step in found if step == 192]


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """What was logged to an offline run: records in LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    body, place, parts, rows = path.read_bytes(), 7, b"", []  # after W&B's own header
    while place < len(body):
        if 32768 - place % 32768 < 7:  # no room for a record's head: padding
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", body, place + 4)
        parts += body[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            items = Record.FromString(parts).history.item
            names = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            rows += [names] if names else []
            parts = b""
    return rows


@pytest.mark.slow
def test_weights_and_biases_offline_leaves_a_run_to_be_synced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("wandb")
    config = Config.model_validate({"observe": {"wandb": "offline"}, "run_dir": str(tmp_path)})
    sink = WeightsAndBiases(tmp_path, config.observe, config.model_dump(mode="json"))
    sink.on_start(Clock(), 256, "fresh")
    sink.on_step(Clock(128, 1), replace(RECORD, logged=True))
    sink.on_samples(Clock(256, 2), np.zeros((2, 1, 8, 8), np.float32), np.array([0, 1]), 2)
    sink.on_validation(Clock(128, 1), Validation(validation_loss=0.25))  # repeated, or after a roll-back
    sink.close()
    assert not caplog.records
    (path,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    rows = wandb_history(path)
    assert [row["images_seen"] for row in rows] == [128, 256, 128]
    assert rows[0]["loss"] == 0.5 and rows[1]["samples/format"] == "png" and rows[2]["validation_loss"] == 0.25
