"""Checkpoint laws: what is committed stays, what is damaged is passed over by name, one failed write ends no run."""

from __future__ import annotations

import os
import pickle
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from sdit.checkpoint.files import write_shard
from sdit.checkpoint.find import list_checkpoints
from sdit.checkpoint.saver import MAX_FAILURES, Saver
from sdit.checkpoint.shard_set import ShardSet
from sdit.checkpoint.space import check_space
from sdit.checkpoint.store import CheckpointStore, Snapshot
from sdit.config import CheckpointConfig
from sdit.distributed.comm import Comm
from sdit.errors import CheckpointError, ConfigError
from sdit.launch_environment import RankInfo
from tests.stored_tensors import stored_tensor

ELEMENTS = 1 << 17  # 512 KiB a checkpoint


class OneRank:
    """The process group of a single process."""

    rank, world, is_first, device = 0, 1, True, torch.device("cpu")
    info = RankInfo(0, 1, 0, 1, "test")

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def first_reports(self, value: Any, most: int) -> dict[int, Any]:
        return {} if value is None else {0: value}

    def from_first(self, value: Any) -> Any:
        return value

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values


def snapshot(images: int) -> Snapshot:
    values = np.random.default_rng(images).normal(size=ELEMENTS).astype(np.float32)
    facts = {"clock": {"images_seen": images, "steps": 1}, "config": {}}
    return Snapshot(images, {"weight/w@0": values}, {"weight/w": (ELEMENTS,)}, facts)


def store_in(folder: Path, **config: Any) -> CheckpointStore:
    return CheckpointStore(folder, CheckpointConfig(**config), cast(Comm, OneRank()))


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def content(folder: Path, manifest: dict) -> np.ndarray:
    with ShardSet(folder, manifest) as shards:
        return stored_tensor(shards, "weight/w").numpy()


def flip_a_byte(folder: Path) -> None:
    path = folder / "shard-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_pickle(folder: Path) -> None:
    (folder / "shard-00000.safetensors").write_bytes(pickle.dumps(Exploit(folder.parent / "payload")))


class Exploit:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped byte": flip_a_byte,
    "truncated shard": lambda folder: os.truncate(folder / "shard-00000.safetensors", 1000),
    "empty shard": lambda folder: os.truncate(folder / "shard-00000.safetensors", 0),
    "missing shard": lambda folder: (folder / "shard-00000.safetensors").unlink(),
    "torn manifest": lambda folder: os.truncate(folder / "manifest.json", 100),
    "missing manifest": lambda folder: (folder / "manifest.json").unlink(),
    "changed manifest": lambda f: (f / "manifest.json").write_text(
        (f / "manifest.json").read_text().replace("20", "21")
    ),
    "pickle": replace_by_pickle,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint_is_passed_over_by_name(tmp_path: Path, kind: str) -> None:
    store = store_in(tmp_path)
    store.save(snapshot(10))
    newest = store.save(snapshot(20))
    DAMAGE[kind](newest)
    found = store.find()
    assert found is not None and found.folder.name == "images-000000000010"
    assert newest.name in found.skipped[0]
    assert np.array_equal(content(found.folder, found.manifest), snapshot(10).tensors["weight/w@0"])
    with pytest.raises(CheckpointError, match=newest.name):
        store_in(tmp_path, resume=str(newest)).find()
    assert not (tmp_path / "payload").exists()


def test_run_whose_checkpoints_are_all_damaged_does_not_start_afresh_by_itself(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    flip_a_byte(store.save(snapshot(10)))
    with pytest.raises(CheckpointError, match="legal: never"):
        store.find()


def test_latest_that_points_nowhere_changes_nothing(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.save(snapshot(10))
    (tmp_path / "latest").write_text("images-000000009999\n")
    found = store.find()
    assert found is not None and found.folder.name == "images-000000000010"


def test_what_a_killed_writer_left_is_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.save(snapshot(10))
    assert store.write_shard(snapshot(20)) is None  # every part is written, the commit never comes
    found = store.find()
    assert found is not None and found.folder.name == "images-000000000010"
    store.begin(10)
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


def test_starting_afresh_keeps_the_new_checkpoints_not_the_old_run_s(tmp_path: Path) -> None:
    old = store_in(tmp_path)
    for images in (100, 200):
        old.save(snapshot(images))
    new = store_in(tmp_path, resume="never")
    assert new.find() is None
    new.begin(0)
    for images in (10, 20, 30):
        new.save(snapshot(images))
    assert names(tmp_path) == ["images-000000000030", "images-000000000020"]
    assert (tmp_path / "aside-images-000000000200").is_dir()


def test_shard_is_a_safetensors_file_with_the_values(tmp_path: Path) -> None:
    tensors = {
        "a/é@0": np.arange(5, dtype=np.float32),
        "b@7": np.full(3, np.nan, np.float32),
        "c@0": np.zeros(0, np.float32),
    }
    record = write_shard(tmp_path, "s.safetensors", tensors, {"a/é": (5,)})
    loaded = load_file(tmp_path / "s.safetensors")
    assert loaded.keys() == tensors.keys() and record.size_bytes == (tmp_path / "s.safetensors").stat().st_size
    for key, want in tensors.items():
        assert loaded[key].tobytes() == want.tobytes()


class Outcome:
    """What a saver told."""

    def __init__(self) -> None:
        self.saved: list[str] = []
        self.failed: list[str] = []

    def saver(self, store: CheckpointStore, source: Callable[[], Snapshot], asynchronous: bool = False) -> Saver:
        comm = cast(Comm, OneRank())
        return Saver(
            store, comm, source, asynchronous, lambda folder, _: self.saved.append(folder.name), self.failed.append
        )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_full_disk_leaves_the_run_alive_and_the_previous_checkpoint_whole(small_disk: Path, asynchronous: bool) -> None:
    outcome, moment = Outcome(), [10]
    store = store_in(small_disk)
    saver = outcome.saver(store, lambda: snapshot(moment[0]), asynchronous)
    saver.save()
    saver.finish()
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1300 << 10))  # 1.3 MiB: with one checkpoint of 0.5 MiB there is no room for a second
    moment[0] = 20
    saver.save()
    saver.finish()
    assert outcome.saved == ["images-000000000010"] and "No space left" in outcome.failed[0]
    assert saver.saved_at == 10, "a moment that could not be saved must be saved again at the end of the run"
    found = store.find()
    assert found is not None and found.folder.name == "images-000000000010" and found.skipped == ()
    assert [path.name for path in small_disk.iterdir() if "tmp" in path.name] == []
    ballast.unlink()
    saver.save()
    saver.finish()
    assert outcome.saved == ["images-000000000010", "images-000000000020"] and saver.saved_at == 20


def test_full_disk_gives_up_the_oldest_checkpoint_for_a_new_one(small_disk: Path) -> None:
    store = store_in(small_disk, keep_last=2)
    for images in (10, 20):
        store.save(snapshot(images))
    (small_disk / "ballast").write_bytes(bytes(700 << 10))
    store.save(snapshot(30))
    assert names(small_disk) == ["images-000000000030", "images-000000000020"]


def test_failures_in_a_row_end_the_run_and_a_success_forgets_them(small_disk: Path) -> None:
    outcome, store = Outcome(), store_in(small_disk)
    saver = outcome.saver(store, lambda: snapshot(10))
    for write_allowed in (False, False, True, False, False):
        subprocess.run(["mount", "-o", f"remount,{'rw' if write_allowed else 'ro'}", str(small_disk)], check=True)
        saver.save()
    assert len(outcome.failed) == 4 and "Read-only" in outcome.failed[0]
    with pytest.raises(CheckpointError, match="Read-only"):
        saver.save()
    assert MAX_FAILURES == 3


def test_start_is_refused_when_there_is_no_room(small_disk: Path) -> None:
    with pytest.raises(ConfigError, match=f"{3 * (1 << 20)} bytes more are needed"):
        check_space(small_disk, 1 << 20, keep_last=2, files=1)
    check_space(small_disk, 600 << 10, keep_last=2, files=1)


def test_background_write_holds_the_moment_it_began_at(tmp_path: Path) -> None:
    live = snapshot(10)
    expected = live.tensors["weight/w@0"].copy()
    outcome = Outcome()
    saver = outcome.saver(store_in(tmp_path), lambda: live, asynchronous=True)
    saver.save()
    live.tensors["weight/w@0"][:] = 0.0
    saver.finish()
    found = store_in(tmp_path).find()
    assert found is not None and outcome.saved == ["images-000000000010"]
    assert np.array_equal(content(found.folder, found.manifest), expected)


def test_background_write_is_committed_through_the_step_s_flags_alone(tmp_path: Path) -> None:
    outcome = Outcome()
    saver = outcome.saver(store_in(tmp_path), lambda: snapshot(10), asynchronous=True)
    saver.save()
    for _ in range(10_000):
        if outcome.saved:
            break
        saver.advance(*saver.flags())
        time.sleep(0.001)
    assert outcome.saved == ["images-000000000010"] and names(tmp_path) == outcome.saved
