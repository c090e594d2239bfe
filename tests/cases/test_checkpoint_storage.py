"""Checkpoints on a full disk or quota, on ranks that are not equally fast, and what faults leave behind."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from sdit.checkpoint import store as store_module
from sdit.checkpoint.files import ShardRecord, shard_table, write_shard
from sdit.checkpoint.saver import Saver
from sdit.checkpoint.shard_reports import append_report, report_path, take_reports
from sdit.checkpoint.shard_set import ShardSet
from sdit.checkpoint.space import check_space
from sdit.checkpoint.store import CheckpointStore, Snapshot, find_checkpoint, list_checkpoints
from sdit.config import CheckpointConfig
from sdit.distributed.comm import Comm
from sdit.errors import CheckpointError, ConfigError
from sdit.launch_environment import RankInfo
from sdit.supervise.run_folder import RunFolder
from sdit.train.rundir import prepare_run_dir
from tests.faults.test_checkpoint_faults import small_disk

__all__ = ["small_disk"]
ELEMENTS = 1 << 16  # 256 KiB a rank
SAVES = 12


class Group:
    """A process group of threads: what all ranks put in, all take out."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.barrier = threading.Barrier(world, timeout=60)
        self.values: list[Any] = [None] * world

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


class ThreadRank:
    """One rank of such a group."""

    device = torch.device("cpu")

    def __init__(self, group: Group, rank: int) -> None:
        self._group, self.rank, self.world, self.is_first = group, rank, group.world, rank == 0
        self.info = RankInfo(rank, group.world, rank, group.world, "test")

    def gather(self, value: Any) -> list[Any]:
        return self._group.exchange(self.rank, value)

    def first_reports(self, value: Any, most: int) -> dict[int, Any]:
        values = enumerate(self._group.exchange(self.rank, value))
        return dict([(rank, value) for rank, value in values if value is not None][:most])

    def among(self, ranks: Sequence[int], values: torch.Tensor) -> torch.Tensor:
        everyone = self._group.exchange(self.rank, values.clone())
        return torch.stack([everyone[rank] for rank in ranks])

    def from_first(self, value: Any) -> Any:
        return self._group.exchange(self.rank, value)[0]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._group.exchange(self.rank, values.clone())).sum(0)


def on_ranks(world: int, work: Callable[[Comm], None]) -> None:
    """Run `work` on every rank. Raises: the first rank's error."""
    group, errors = Group(world), list[BaseException]()

    def run(rank: int) -> None:
        try:
            work(cast(Comm, ThreadRank(group, rank)))
        except BaseException as error:
            errors.append(error)
            group.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise next((each for each in errors if not isinstance(each, threading.BrokenBarrierError)), errors[0])


def snapshot(images: int, rank: int = 0) -> Snapshot:
    values = np.random.default_rng((images, rank)).normal(size=ELEMENTS).astype(np.float32)
    facts = {"clock": {"images_seen": images, "steps": 1}, "config": {}}
    return Snapshot(images, {f"weight/w{rank}@0": values}, {f"weight/w{rank}": (ELEMENTS,)}, facts)


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

    def write(self, folder: Path, name: str, tensors: Any, shapes: Any) -> Any:
        needed = sum(flat.nbytes for flat in tensors.values())
        if size_of(self._folder) + needed > self._limit:
            raise OSError(self._number, os.strerror(self._number))
        return write_shard(folder, name, tensors, shapes)

    def remove(self, path: Path, ignore_errors: bool = False) -> None:
        time.sleep(0.05)
        self._remove(path, ignore_errors=ignore_errors)


def save_all(folder: Path, comm: Comm, asynchronous: bool, saves: int = SAVES) -> tuple[list[str], list[str]]:
    """Save many moments; return the names that were committed and the texts of the failures."""
    saved: list[str] = []
    failed: list[str] = []
    moment = [0]
    store = CheckpointStore(folder, CheckpointConfig(keep_last=2), comm)
    saver = Saver(
        store, comm, lambda: snapshot(moment[0], comm.rank), asynchronous,
        lambda path, _: saved.append(path.name), failed.append,
    )  # fmt: skip
    for number in range(1, saves + 1):
        moment[0] = 10 * number
        saver.save()
        saver.finish()
    return saved, failed


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


def node_ranks(world: int, ranks_per_node: int, work: Callable[[Comm], None]) -> None:
    """Run `work` on every rank of nodes with `ranks_per_node` ranks each."""

    def place(comm: Comm) -> None:
        comm.info = RankInfo(comm.rank, world, comm.rank % ranks_per_node, ranks_per_node, "test")
        work(comm)

    on_ranks(world, place)


def node_store(folder: Path, comm: Comm) -> CheckpointStore:
    return CheckpointStore(folder, CheckpointConfig(files="node"), comm)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("per_node", [1, 2, 4])
def test_the_ranks_of_a_node_write_one_file_together(tmp_path: Path, per_node: int, asynchronous: bool) -> None:
    """One node with 4 ranks, two with 2, and four with 1: a file for each node, with the state of all ranks."""
    saved: list[str] = []

    def work(comm: Comm) -> None:
        store = node_store(tmp_path, comm)
        saver = Saver(
            store, comm, lambda: snapshot(10, comm.rank), asynchronous, lambda *_: saved.append(""), pytest.fail
        )
        saver.save()
        saver.finish()

    node_ranks(4, per_node, work)
    folder = tmp_path / "images-000000000010"
    files = [f"node-{number:05d}.shards" for number in range(4 // per_node)]
    assert len(saved) == 4 and sorted(path.name for path in folder.glob("node-*")) == files
    with ShardSet(folder, find_checkpoint(folder).manifest) as shards:
        for rank in range(4):
            want = snapshot(10, rank).tensors[f"weight/w{rank}@0"]
            assert shards.tensor(f"weight/w{rank}").numpy().tobytes() == want.tobytes()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_node_file_that_one_rank_cannot_write_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The other rank's bytes are removed with it, the checkpoint before stays, and the next save is whole."""
    fails = [False]

    def write(folder: Path, name: str, tensors: Any, shapes: Any, place: Any) -> Any:
        if fails[0] and f"weight/w{failing}@0" in tensors:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write_shard(folder, name, tensors, shapes, place)

    monkeypatch.setattr(store_module, "write_shard", write)

    def save(images: int) -> Callable[[Comm], None]:
        return lambda comm: cast(None, node_store(tmp_path, comm).save(snapshot(images, comm.rank)))

    node_ranks(2, 2, save(10))
    fails[0] = True
    with pytest.raises(CheckpointError, match=rf"rank {failing}: .*node-00000\.shards: "):
        node_ranks(2, 2, save(20))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["images-000000000010"]
    fails[0] = False
    node_ranks(2, 2, save(20))
    assert find_checkpoint(tmp_path / "images-000000000020").manifest["format"] == 2


def test_a_longer_file_that_a_killed_writer_left_is_cut(tmp_path: Path) -> None:
    """A restart with less state writes the same node file before rank 0 removed the old one."""
    (tmp_path / ".images-000000000010.tmp").mkdir()
    (tmp_path / ".images-000000000010.tmp" / "node-00000.shards").write_bytes(b"x" * 4 * ELEMENTS * 3)
    node_ranks(2, 2, lambda comm: cast(None, node_store(tmp_path, comm).save(snapshot(10, comm.rank))))
    assert find_checkpoint(tmp_path / "images-000000000010").skipped == ()


@pytest.mark.parametrize("problem", ["missing", "damaged"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_a_rank_whose_report_does_not_arrive_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str, asynchronous: bool
) -> None:
    """Rank 0 commits what all ranks have reported, or nothing. All ranks get the cause, and the next save succeeds."""
    is_broken, append = [True], store_module.append_report

    def report(folder: Path, node: int, rank: int, shard: Any) -> None:
        if rank != 2 or not is_broken[0]:
            append(folder, node, rank, shard)
        elif problem == "damaged":
            with report_path(folder, node).open("a") as file:
                file.write('{"rank": 2, "sha')

    monkeypatch.setattr(store_module, "append_report", report)
    results: dict[int, tuple[list[str], list[str]]] = {}

    def save(comm: Comm) -> None:
        results[comm.rank] = save_all(tmp_path, comm, asynchronous, saves=1)

    node_ranks(4, 2, save)
    reason = "rank 2 has not reported its shard" if problem == "missing" else "is incomplete or not a report of a shard"
    for saved, (text,) in results.values():
        assert saved == [] and text.startswith("checkpoint not written: rank 0: ") and reason in text
    assert list(tmp_path.iterdir()) == []
    is_broken[0] = False
    node_ranks(4, 2, save)
    assert [saved for saved, _ in results.values()] == [["images-000000000010"]] * 4
    assert not [path.name for path in (tmp_path / "images-000000000010").iterdir() if "report" in path.name]


def test_many_failing_ranks_are_counted_and_the_first_ones_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, name: str, *_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(store_module, "write_shard", fail)
    texts: list[str] = []
    on_ranks(7, lambda comm: texts.extend(save_all(tmp_path, comm, False, saves=1)[1]))
    assert len(texts) == 7 and len(set(texts)) == 1
    assert [f"rank {rank}: " in texts[0] for rank in range(7)] == [True] * 4 + [False] * 3
    assert texts[0].endswith("; and 3 ranks more")


def test_a_rank_that_has_reported_twice_counts_with_its_last_report(tmp_path: Path) -> None:
    """A killed writer may have left its report, which the restart does not remove."""
    append_report(tmp_path, 0, 0, {"record": 1})
    append_report(tmp_path, 0, 1, None)
    append_report(tmp_path, 0, 0, {"record": 2})
    append_report(tmp_path, 1, 2, {"record": 3})
    assert take_reports(tmp_path, [0, 0, 1]) == [{"record": 2}, None, {"record": 3}]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["7", "[0, null]", '{"rank": 0}', '{"rank": 0, "shard"'])
def test_a_line_that_is_no_report_fails_the_save(tmp_path: Path, line: str) -> None:
    append_report(tmp_path, 0, 0, None)
    with report_path(tmp_path, 0).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(CheckpointError, match="a report of a shard"):
        take_reports(tmp_path, [0])


def test_reports_that_an_attempt_on_other_nodes_has_left_do_not_count(tmp_path: Path) -> None:
    """Ranks 0 and 1 had a node each, and now share one. The restart could not remove what rank 1 had reported."""
    temporary = tmp_path / ".images-000000000010.tmp"
    temporary.mkdir()
    old = ShardRecord("node-00001.shards", 4 * ELEMENTS, "0" * 32, 0, 4 * ELEMENTS)
    table = shard_table(snapshot(9, 1).tensors, snapshot(9, 1).shapes, 0)
    append_report(temporary, 1, 1, {"record": vars(old), "ranges": table.ranges, "shapes": table.shapes})
    node_ranks(4, 2, lambda comm: cast(None, node_store(tmp_path, comm).save(snapshot(10, comm.rank))))
    found = find_checkpoint(tmp_path / "images-000000000010")
    with ShardSet(found.folder, found.manifest) as shards:
        for rank in range(4):
            assert np.array_equal(shards.tensor(f"weight/w{rank}"), snapshot(10, rank).tensors[f"weight/w{rank}@0"])
