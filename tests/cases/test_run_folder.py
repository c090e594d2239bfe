"""The folder of a running run is renamed, replaced, deleted or unmounted (rows R15 and S11)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sdit.checkpoint.find import find_checkpoint
from sdit.clock import Clock
from sdit.config import load_config
from sdit.errors import ExitCode
from sdit.observe.metrics_file import MetricsFile, read_metrics
from sdit.observe.routing_maps import RoutingMaps
from sdit.observe.sample_grids import SampleGrids
from sdit.supervise.coordinator import LOST_SECONDS
from sdit.supervise.run_folder import RunFolder
from tests.distributed.harness import ROOT
from tests.faults.ranks import Ranks, eventually, is_gone, newest_step, start_fake, start_real

TINY = Path(__file__).parents[1] / "distributed" / "tiny.yaml"
TRAIN = [sys.executable, str(ROOT / "launcher" / "train.py"), "--config", str(TINY)]
ENDLESS = ("train.steps=1000000", "checkpoint.every_steps=20")


def children(ranks: Ranks) -> list[int]:
    return [ranks.child_pid(rank) for rank in range(len(ranks.processes))]


def remove(folder: Path) -> None:
    """`rm -r`, repeated if a rank writes to the folder meanwhile."""
    eventually(lambda: shutil.rmtree(folder) is None)


def test_renamed_run_is_saved_in_its_folder_and_stops(tmp_path: Path) -> None:
    """R15: `mv RUN MOVED` while two ranks train: one line, all steps are in MOVED, and nothing appears at the old path."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    with start_real(2, run, TINY, *ENDLESS) as ranks:
        eventually(lambda: newest_step(run) > 0)
        pids = children(ranks)
        run.rename(moved)
        assert ranks.codes() == [ExitCode.CONFIG] * 2
    assert all(map(is_gone, pids)) and not run.exists()
    (line,) = ranks.fatal
    assert line.startswith(f"error: run_dir: {run}: was renamed to {moved} while")
    steps = [record["step"] for record in read_metrics(moved)]
    assert steps == list(range(1, len(steps) + 1)), "no line is lost"
    assert find_checkpoint(moved).manifest["clock"]["steps"] == steps[-1]
    assert not (moved / "lock.json").exists()


def test_run_whose_folder_is_replaced_does_not_touch_the_other(tmp_path: Path) -> None:
    """R15: `mv RUN OLD; mkdir RUN` for a new run: the first one is saved in OLD, and the new folder stays empty."""
    run, old = tmp_path / "run", tmp_path / "old"
    with start_real(1, run, TINY, *ENDLESS) as ranks:
        eventually(lambda: newest_step(run) > 0)
        run.rename(old)
        run.mkdir()
        assert ranks.codes() == [ExitCode.CONFIG]
    assert list(run.iterdir()) == []
    assert find_checkpoint(old).manifest["clock"]["steps"] == read_metrics(old)[-1]["step"]


@pytest.fixture
def replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A folder that is replaced after a writer has asked for its path, and before it writes there."""
    folder = RunFolder.create(tmp_path / "run")
    folder.path.rename(tmp_path / "old")
    folder.path.mkdir()
    monkeypatch.setattr(RunFolder, "now", property(lambda self: self.path))
    return folder


def test_what_is_created_in_a_run_folder_is_never_in_another(replaced: RunFolder, tmp_path: Path) -> None:
    """R15: a new folder may be at the path by the time of a write."""
    config = load_config(TINY)
    for name in ("logs", "logs"):
        replaced.make(name)
    metrics, maps, grids = (
        MetricsFile(replaced),
        RoutingMaps.of(config, replaced),
        SampleGrids.of(config, replaced, True),
    )
    for observer in (metrics, maps, grids):
        observer.on_start(Clock(), 320, "fresh")
    metrics.on_event(Clock(32, 1), "checkpoint", "written")
    with pytest.raises(
        FileNotFoundError
    ):  # the observers of a run try again, and then its folder is known to have moved
        grids.on_samples(Clock(32, 1), np.zeros((1, 1, 8, 8), dtype=np.float32), np.zeros(1, dtype=np.int64), 1)
    assert list(replaced.path.iterdir()) == []
    names = sorted(path.name for path in (tmp_path / "old").iterdir())
    assert names == ["events.jsonl", "logs", "metrics.jsonl", "routing", "samples"]
    assert len((tmp_path / "old" / "events.jsonl").read_text().splitlines()) == 2


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    (tmp_path / "run" / "logs").touch()
    with pytest.raises(FileExistsError) as error:
        folder.make("logs")
    assert error.value.filename == str(tmp_path / "run" / "logs")


def test_nothing_is_created_in_a_deleted_folder_nor_in_a_new_one_at_its_path(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    metrics = MetricsFile(folder)
    folder.path.rmdir()
    folder.path.mkdir()
    metrics.on_event(Clock(), "start", "fresh")
    with pytest.raises(FileNotFoundError):
        folder.make("logs")
    assert list(folder.path.iterdir()) == []


def test_renamed_parent_is_noticed_without_a_supervisor(tmp_path: Path) -> None:
    """R15: the folder above is renamed, and `supervise.enabled` is false."""
    run = tmp_path / "runs" / "one"
    run.parent.mkdir()
    with start_real(1, run, TINY, *ENDLESS, "supervise.enabled=false") as ranks:
        eventually(lambda: newest_step(run) > 0)
        (tmp_path / "runs").rename(tmp_path / "archive")
        assert ranks.codes() == [ExitCode.CONFIG]
    moved = tmp_path / "archive" / "one"
    assert not (tmp_path / "runs").exists() and not (moved / "lock.json").exists()
    assert find_checkpoint(moved).manifest["clock"]["steps"] == read_metrics(moved)[-1]["step"]


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_deleted_run_stops_in_one_line(tmp_path: Path, world: int) -> None:
    """S11: `rm -r RUN` while ranks train: one line, no restart, and nobody creates the folder again."""
    run = tmp_path / "run"
    with start_real(world, run, TINY, *ENDLESS) as ranks:
        eventually(lambda: newest_step(run) > 0)
        pids = children(ranks)
        while run.exists():  # the ranks still write
            shutil.rmtree(run, ignore_errors=True)
        assert ranks.codes(seconds=30) == [ExitCode.CONFIG] * world
    assert all(map(is_gone, pids)) and not run.exists()
    (line,) = ranks.fatal
    assert line.startswith(f"error: run_dir: {run}: was deleted")
    assert ranks.output.rstrip().endswith(line), "and nothing after it"


@pytest.mark.parametrize("world", [1, 3])
def test_deleted_run_leaves_no_rank_and_starts_none(tmp_path: Path, world: int) -> None:
    """S11: the supervisors leave although they have no folder left to agree in."""
    run = tmp_path / "run"
    with start_fake(world, run, steps=100_000) as ranks:
        eventually(lambda: newest_step(run) >= 4)
        pids = children(ranks)
        while run.exists():  # the ranks still write
            shutil.rmtree(run, ignore_errors=True)
        assert ranks.codes(seconds=20) == [ExitCode.CONFIG] * world
    assert all(map(is_gone, pids)) and not run.exists()
    assert len(ranks.fatal) == 1 and "was deleted" in ranks.fatal[0]


def test_crash_after_a_rename_is_not_tried_again(tmp_path: Path) -> None:
    """R15: a rank that crashes in the renamed folder is not restarted: its command names the old path."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    with start_fake(2, run, faults=["hang@0:6"], config={"step_seconds": 2.5, "first_step_seconds": 2.5}) as ranks:
        eventually((run / "struck").exists)
        run.rename(moved)
        assert ranks.codes() == [ExitCode.CONFIG] * 2
    assert not run.exists() and newest_step(moved) == 4
    assert len(ranks.fatal) == 1 and f"was renamed to {moved}" in ranks.fatal[0]


def test_part_of_a_run_that_is_deleted_is_made_again(tmp_path: Path) -> None:
    """S11: only the run folder itself is never created again; `rm -r RUN/supervise RUN/checkpoints` ends nothing."""
    run = tmp_path / "run"
    with start_real(1, run, TINY, *ENDLESS) as ranks:
        eventually(lambda: newest_step(run) > 0)
        remove(run / "supervise")
        (run / "checkpoints").rename(tmp_path / "kept")
        eventually(lambda: newest_step(run) > 0)
        ranks.send(0, signal.SIGTERM)
        assert ranks.codes() == [ExitCode.REQUEUE]
    assert ranks.fatal == []


@pytest.mark.parametrize("world", [1, 2])
def test_end_is_reported_again_until_the_folder_is_back(tmp_path: Path, world: int) -> None:
    """S11: `rm -r RUN/supervise` and a stop in the same instant: no end is lost."""
    run = tmp_path / "run"
    with start_fake(world, run, steps=100_000) as ranks:
        eventually(lambda: newest_step(run) >= 4)
        remove(run / "supervise")
        ranks.send(0, signal.SIGTERM)
        assert ranks.codes(seconds=30) == [ExitCode.REQUEUE] * world
    assert ranks.fatal == []


def test_ends_that_are_deleted_are_reported_again(tmp_path: Path) -> None:
    """S11: rank 0 reads no end before it is removed: rank 1 has ended, and rank 0 hangs."""
    run = tmp_path / "run"
    config = {"step_seconds": 3.0, "first_step_seconds": 3.0, "restarts": 0}
    with start_fake(2, run, faults=["exception@1:6"], config=config) as ranks:
        eventually((run / "struck").exists)
        for _ in range(20):
            shutil.rmtree(run / "supervise", ignore_errors=True)
            time.sleep(0.02)
        assert ranks.codes(seconds=30) == [ExitCode.CRASH] * 2
    assert len(ranks.fatal) == 1 and ranks.fatal[0].startswith("FATAL rank 1,")


def test_ranks_find_each_other_in_a_folder_that_was_deleted(tmp_path: Path) -> None:
    """S11: `rm -r RUN/supervise` while rank 0 waits for rank 1, and again while rank 1 waits to be named."""
    run = tmp_path / "run"
    with start_fake(2, run, steps=100_000, only=(0,)) as ranks:
        eventually(lambda: list((run / "supervise").glob("*/plan.json")))
        remove(run / "supervise")
        ranks.join(1)
        for _ in range(10):
            time.sleep(0.1)
            shutil.rmtree(run / "supervise", ignore_errors=True)
        eventually(lambda: newest_step(run) >= 4)
        ranks.send(0, signal.SIGTERM)
        assert ranks.codes() == [ExitCode.REQUEUE] * 2


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB. Needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


@pytest.mark.cluster
def test_unmounted_run_is_saved_where_it_is_and_stops(tmp_path: Path, disk: Path) -> None:
    """R15: `umount -l` below a run: the descriptor still leads to the folder, and the mount point stays empty."""
    run = disk / "run"
    with start_real(1, run, TINY, *ENDLESS) as ranks:
        eventually(lambda: newest_step(run) > 0)
        ranks.log = tmp_path / "log"
        shutil.copy(run.with_suffix(".log"), ranks.log)
        subprocess.run(["umount", "-l", str(disk)], check=True)
        assert ranks.codes() == [ExitCode.CONFIG]
    assert list(disk.iterdir()) == []


def fill(disk: Path) -> None:
    """Leave no byte free, as a file system that went read-only has none."""
    with (disk / "fill").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.cluster
def test_disk_that_takes_nothing_for_a_while_ends_no_run(tmp_path: Path, disk: Path) -> None:
    """R15: the supervisors cannot write to one another for longer than a lost one is waited for."""
    run = disk / "run"
    with start_real(2, run, TINY, ENDLESS[0], "checkpoint.every_steps=1000000") as ranks:
        eventually(lambda: read_metrics(run))
        fill(disk)
        time.sleep(LOST_SECONDS + 5)
        assert [process.poll() for process in ranks.processes] == [None, None]
        (disk / "fill").unlink()
        ranks.send(1, signal.SIGTERM)
        assert ranks.codes() == [ExitCode.REQUEUE] * 2
        assert ranks.fatal == []


@pytest.mark.cluster
def test_disk_that_takes_nothing_at_the_end_is_an_input_output_error(tmp_path: Path, disk: Path) -> None:
    """R15: neither the last checkpoint nor the exit reports can be written: all ranks exit with 74, and each line says why.

    What a failed checkpoint frees may suffice for one exit report. Then rank 0 also logs how the attempt ended.
    """
    run = disk / "run"
    command = [*TRAIN, "--run-dir", str(run), ENDLESS[0], "checkpoint.every_steps=1000000"]
    with Ranks(2, command, tmp_path / "log") as ranks:
        eventually(lambda: read_metrics(run))
        fill(disk)
        ranks.send(1, signal.SIGTERM)
        assert ranks.codes(seconds=2 * LOST_SECONDS + 60) == [ExitCode.IO] * 2
    assert any(line.endswith("cannot be written (No space left on device); next: none") for line in ranks.fatal)
    assert all("No space left on device" in line for line in ranks.fatal)


def test_paths_follow_a_folder(tmp_path: Path) -> None:
    """R15: a path in the folder is in it after a rename; a folder of the same name in its place is another one."""
    from sdit.supervise.run_folder import RunFolder

    run, moved = tmp_path / "run", tmp_path / "moved"
    run.mkdir()
    with RunFolder(run) as folder:
        assert folder / "file" == run / "file" and folder.problem == ""
        run.rename(moved)
        assert folder / "file" == moved / "file" and str(moved) in folder.problem
        run.mkdir()
        assert folder.now == moved
        moved.rename(tmp_path / "again")
        assert folder.now == tmp_path / "again"
        (tmp_path / "again").rmdir()
        assert folder.now is None and "was deleted" in folder.problem
        with pytest.raises(FileNotFoundError):
            run.rmdir()
            folder.make("logs")
    assert sys.platform != "linux" or os.listdir(tmp_path) == []


def test_symbolic_link_that_leads_elsewhere_is_noticed(tmp_path: Path) -> None:
    """R15: `run_dir` is a link, and the link is changed: the run stays in its folder."""
    from sdit.supervise.run_folder import RunFolder

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "one")
    with RunFolder(link) as folder:
        assert folder.now == link
        link.unlink()
        link.symlink_to(tmp_path / "two")
        assert folder.now == tmp_path / "one"


@pytest.mark.cluster
@pytest.mark.parametrize("world", [1, 2])
def test_launch_on_a_full_disk_asks_for_a_retry(tmp_path: Path, disk: Path, world: int) -> None:
    """All ranks exit with the code of a storage fault, because a retry can succeed, and one line names the folder."""
    run = disk / "run"
    run.mkdir()
    fill(disk)
    with start_real(world, run, TINY, log=tmp_path / "log") as ranks:
        assert ranks.codes() == [ExitCode.IO] * world
    (line,) = ranks.fatal
    assert line.startswith(f"error: run_dir: {run}: cannot be written (No space left on device); free space")
    (disk / "fill").unlink()
    with start_real(world, run, TINY, "train.steps=2", log=tmp_path / "log") as ranks:
        assert ranks.codes() == [ExitCode.DONE] * world
