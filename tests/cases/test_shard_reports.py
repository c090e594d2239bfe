"""One file for the shards of a node, and what ranks report of their shards to rank 0."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from sdit.checkpoint import store as store_module
from sdit.checkpoint.files import ShardRecord, shard_table, write_shard
from sdit.checkpoint.find import find_checkpoint
from sdit.checkpoint.saver import Saver
from sdit.checkpoint.shard_reports import append_report, report_path, take_reports
from sdit.checkpoint.shard_set import ShardSet
from sdit.distributed.comm import Comm
from sdit.errors import CheckpointError
from tests.cases.thread_ranks import ELEMENTS, node_ranks, node_store, on_ranks, save_all, snapshot
from tests.stored_tensors import stored_tensor


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
            assert stored_tensor(shards, f"weight/w{rank}").numpy().tobytes() == want.tobytes()


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
            assert np.array_equal(
                stored_tensor(shards, f"weight/w{rank}"), snapshot(10, rank).tensors[f"weight/w{rank}@0"]
            )
