"""Checkpoints on a full disk or quota, on ranks that are not equally fast, and what faults leave behind."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from sdit.checkpoint import store as store_module
from sdit.checkpoint.files import write_shard
from sdit.checkpoint.find import list_checkpoints
from sdit.checkpoint.space import check_space
from sdit.checkpoint.store import CheckpointStore
from sdit.config import CheckpointConfig
from sdit.distributed.comm import Comm
from sdit.errors import CheckpointError, ConfigError
from sdit.supervise.run_folder import RunFolder
from sdit.train.rundir import prepare_run_dir
from tests.cases.thread_ranks import ELEMENTS, SAVES, Group, ThreadRank, on_ranks, save_all, snapshot
from tests.faults.test_checkpoint_faults import small_disk

__all__ = ["small_disk"]


def size_of(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


class Quota:
    """Shards are written as long as the folder holds no more than `limit` bytes; folders are removed slowly."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, limit: float, number: int) -> None:
        self._folder, self._limit, self._number = folder, limit, number
        self._remove = shutil.rmtree
        monkeypatch.setattr(store_module, "write_shard", self.write)
        monkeypatch.setattr(store_module.shutil, "rmtree", self.remove)

    def write(self, folder: Path, name: str, tensors: Any, shapes: Any, place: Any) -> Any:
        needed = sum(flat.nbytes for flat in tensors.values())
        if size_of(self._folder) + needed > self._limit:
            raise OSError(self._number, os.strerror(self._number))
        return write_shard(folder, name, tensors, shapes, place)

    def remove(self, path: Path, ignore_errors: bool = False) -> None:
        time.sleep(0.05)
        self._remove(path, ignore_errors=ignore_errors)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=["ENOSPC", "EDQUOT"])
def test_a_full_disk_or_quota_gives_up_the_oldest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, asynchronous: bool
) -> None:
    """R1: With room for 2.5 checkpoints the oldest one goes, whether the disk or a quota is full."""
    Quota(monkeypatch, tmp_path, 2.5 * 4 * ELEMENTS, number)
    results: list[tuple[list[str], list[str]]] = []
    on_ranks(1, lambda comm: results.append(save_all(tmp_path, comm, asynchronous)))
    saved, failed = results[0]
    assert failed == [] and len(saved) == SAVES
    assert [path.name for path in list_checkpoints(tmp_path)] == saved[:-3:-1]


@pytest.mark.parametrize("number", [errno.EIO, errno.EFBIG, errno.EROFS], ids=["EIO", "EFBIG", "EROFS"])
def test_other_errors_give_up_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """R1: An error that room does not cure removes no checkpoint, and its text names the file."""
    results: list[tuple[list[str], list[str]]] = []
    on_ranks(1, lambda comm: results.append(save_all(tmp_path, comm, False, saves=2)))
    Quota(monkeypatch, tmp_path, 0, number)
    store = CheckpointStore(tmp_path, CheckpointConfig(), cast(Comm, ThreadRank(Group(1), 0)))
    with pytest.raises(CheckpointError, match=f"shard-00000.safetensors: {os.strerror(number)}"):
        store.save(snapshot(99))
    assert [path.name for path in list_checkpoints(tmp_path)] == results[0][0][::-1]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_retry_only_after_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, asynchronous: bool
) -> None:
    """S4: No rank writes again while rank 0 still removes parts and the oldest checkpoint; every save succeeds."""
    Quota(monkeypatch, tmp_path, 2.5 * world * 4 * ELEMENTS, errno.ENOSPC)
    results: dict[int, tuple[list[str], list[str]]] = {}
    on_ranks(world, lambda comm: results.update({comm.rank: save_all(tmp_path, comm, asynchronous)}))
    names = [f"images-{10 * number:012d}" for number in range(1, SAVES + 1)]
    assert results == {rank: (names, []) for rank in range(world)}
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


def test_ranks_retry_on_a_small_disk(small_disk: Path) -> None:
    """S4: The same on a real file system of 2 MiB, with 0.75 MiB a checkpoint."""
    results: dict[int, tuple[list[str], list[str]]] = {}
    (small_disk / "ballast").write_bytes(bytes(100 << 10))
    on_ranks(3, lambda comm: results.update({comm.rank: save_all(small_disk, comm, False, saves=20)}))
    assert {rank: failed for rank, (_, failed) in results.items()} == {0: [], 1: [], 2: []}


def test_every_rank_s_own_reason_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S4: The failure names each rank with the text of its own error and its file."""
    reasons = {"shard-00000.safetensors": errno.EIO, "shard-00001.safetensors": errno.EDQUOT}

    def fail(folder: Path, name: str, *_: object) -> None:
        raise OSError(reasons[name], os.strerror(reasons[name]))

    monkeypatch.setattr(store_module, "write_shard", fail)
    texts: list[str] = []

    def save(comm: Comm) -> None:
        with pytest.raises(CheckpointError) as caught:
            CheckpointStore(tmp_path, CheckpointConfig(), comm).save(snapshot(10, comm.rank))
        texts.append(str(caught.value))

    on_ranks(2, save)
    assert len(set(texts)) == 1 and len(texts[0].splitlines()) == 1
    for rank, (name, number) in enumerate(reasons.items()):
        assert f"rank {rank}: " in texts[0] and f"{name}: {os.strerror(number)}" in texts[0]


def test_a_background_write_that_fails_in_any_way_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S4: An error that is no OSError, such as no memory, fails the save; it does not count as written."""

    def fail(*_: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(store_module, "write_shard", fail)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    results: list[tuple[list[str], list[str]]] = []
    on_ranks(1, lambda comm: results.append(save_all(tmp_path, comm, True, saves=1)))
    saved, failed = results[0]
    assert saved == [] and list_checkpoints(tmp_path) == [] and "no memory" in failed[0]


def store_of_one(folder: Path, **config: Any) -> CheckpointStore:
    return CheckpointStore(folder, CheckpointConfig(**config), cast(Comm, ThreadRank(Group(1), 0)))


def damage(folder: Path) -> None:
    with (folder / "shard-00000.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")


def aside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("aside-*"))


def test_damaged_checkpoints_are_kept_for_a_bounded_number(tmp_path: Path) -> None:
    """S13: Of many checkpoints that were damaged one after another, the newest two stay."""
    store = store_of_one(tmp_path)
    store.save(snapshot(10))
    for images in range(20, 100, 10):
        damage(store.save(snapshot(images)))
        found = store.find()
        assert found is not None and found.folder.name == "images-000000000010"
        store.begin(10)
    store.save(snapshot(11))
    assert aside(tmp_path) == ["aside-images-000000000080", "aside-images-000000000090"]


def test_starting_afresh_removes_nothing_before_its_first_checkpoint(tmp_path: Path) -> None:
    """S13: What a start puts aside is removed by retention after a commit, not by the start; archives stay."""
    store = store_of_one(tmp_path, keep_every_images=20)
    for images in range(10, 90, 10):
        store.save(snapshot(images))
    kept = [path.name for path in list_checkpoints(tmp_path)]
    store.begin(0)
    assert aside(tmp_path) == sorted(f"aside-{name}" for name in kept)
    store.save(snapshot(5))
    archives = {f"aside-images-{images:012d}" for images in range(20, 90, 20)}
    assert archives <= set(aside(tmp_path)) and len(aside(tmp_path)) <= len(archives) + 2


def test_a_full_disk_removes_what_was_put_aside_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S13: On a full disk the checkpoints that were put aside go before any good one."""
    store = store_of_one(tmp_path)
    for images in (10, 20, 30):
        store.save(snapshot(images))
    store.begin(20)
    store.save(snapshot(22))
    assert aside(tmp_path) == ["aside-images-000000000030"]
    Quota(monkeypatch, tmp_path, 3.5 * 4 * ELEMENTS, errno.EDQUOT)
    monkeypatch.setattr(store, "_prune", lambda: None)
    store.save(snapshot(24))
    assert [int(path.name[7:]) for path in list_checkpoints(tmp_path)] == [24, 22, 20] and aside(tmp_path) == []


def test_what_was_put_aside_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S13: A start counts the checkpoints that were put aside as room, as they make way for new ones."""
    (tmp_path / "aside-images-000000000010").mkdir()
    shard = tmp_path / "aside-images-000000000010" / "shard-00000.safetensors"
    shard.touch()
    os.truncate(shard, 1 << 43)
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    size = ((1 << 43) + free) // 4
    check_space(tmp_path, size, keep_last=2, files=1)
    with pytest.raises(ConfigError, match="bytes more are needed"):
        check_space(tmp_path, 2 * size, keep_last=2, files=1)


def test_the_report_lists_what_was_put_aside(tmp_path: Path) -> None:
    """S13: The report's table of checkpoints holds those that were put aside."""
    from sdit.report import build_page, read_runs

    store = store_of_one(tmp_path / "checkpoints")
    for images in (10, 20):
        store.save(snapshot(images))
    store.begin(10)
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    text = build_page(read_runs([tmp_path]))
    assert "aside-images-000000000020" in text and "set aside" in text


@pytest.fixture
def old_leftovers(tmp_path: Path) -> Iterator[list[Path]]:
    """Temporary files that killed processes left, hours ago."""
    names = [
        "checkpoints/.latest.77.tmp", ".lock.0123", ".writable.77", ".lock.json.77.tmp", "samples/.partial-images-10.png",
        "routing/.partial-images-10.npz",
    ]  # fmt: skip
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (time.time() - 7200,) * 2)
    yield paths


def test_temporary_files_of_killed_processes_are_removed(tmp_path: Path, old_leftovers: list[Path]) -> None:
    """S13: A start removes old temporary files; young ones may be in use, and named files are never touched."""
    young, named = tmp_path / ".lock.4567", tmp_path / "samples" / "images-10.png"
    young.touch()
    named.touch()
    os.utime(named, (0, 0))
    with RunFolder(tmp_path) as folder:
        prepare_run_dir(folder)
    assert [path for path in old_leftovers if path.exists()] == []
    assert young.exists() and named.exists()


@pytest.mark.cluster
def test_a_real_quota_gives_up_the_oldest_checkpoint(tmp_path: Path) -> None:
    """R1: The same with a user quota of a real ext4 file system: the kernel's EDQUOT reaches the run."""
    if shutil.which("mkfs.ext4") is None or shutil.which("setquota") is None:
        pytest.skip("needs mkfs.ext4 and setquota (apt-get install e2fsprogs quota)")
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-O", "quota", "-E", "quotatype=usrquota", str(image)], check=True)
    if subprocess.run(
        ["mount", "-o", "loop,usrquota", str(image), str(disk)], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting an image needs root and a loop device")
    try:
        blocks = str(int(2.5 * 4 * ELEMENTS) >> 10)
        subprocess.run(["setquota", "-u", "65534", blocks, blocks, "0", "0", str(disk)], check=True)
        (disk / "run").mkdir()
        os.chown(disk / "run", 65534, 65534)
        process = os.fork()
        if process == 0:
            os.setuid(65534)  # root is above quotas
            results: list[tuple[list[str], list[str]]] = []
            on_ranks(1, lambda comm: results.append(save_all(disk / "run", comm, False)))
            os._exit(0 if results[0][1] == [] and len(results[0][0]) == SAVES else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
