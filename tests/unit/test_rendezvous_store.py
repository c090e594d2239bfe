"""What the supervisors of a large launch read from the shared file system."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sdit.launch_environment import SINGLE, RankInfo
from sdit.supervise import members, rendezvous
from sdit.supervise.admission import SILENT_SECONDS
from sdit.supervise.members import Member, MemberRegistry
from sdit.supervise.membership import announce_seconds
from sdit.supervise.node_copy import Beat, NodeCopy
from sdit.supervise.read_schedule import (
    HEALTHY_READS_PER_SECOND,
    LONGEST_SECONDS,
    READS_PER_SECOND,
    STORE_SECONDS,
    read_seconds,
    store_seconds,
)
from sdit.supervise.rendezvous import NODE_SECONDS, AttemptSpec, RendezvousStore
from sdit.supervise.restart_policy import ExitReport
from sdit.supervise.supervisor import POLL_SECONDS

TOKEN = "0" * 32
SPEC = AttemptSpec(attempt=1, members={"0": "a", "1": "b"}, order=(0, 1), hosts=("n0", "n1"))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that the store has read."""
    names: list[str] = []
    original = rendezvous.read_json

    def counted(path: Path) -> dict | None:
        names.append(path.name)
        return original(path)

    for module in (members, rendezvous):
        monkeypatch.setattr(module, "read_json", counted)
    return names


def test_a_healthy_run_reads_a_few_bytes(tmp_path: Path, read: list[str]) -> None:
    writer, reader = RendezvousStore(tmp_path, TOKEN), RendezvousStore(tmp_path, TOKEN)
    (tmp_path / "supervise").mkdir()
    assert reader.attempt_spec() is None
    writer.publish(SPEC)
    first = reader.attempt_spec()
    read.clear()
    for second in range(1, 4):
        os.utime(tmp_path / "supervise" / TOKEN / "beat.json", (second, second))
        spec = reader.attempt_spec()
        assert spec is not None and first is not None
        assert (spec.attempt, spec.order, spec.hosts) == (1, (0, 1), ("n0", "n1")) and spec.beats == second * 10**9
    assert read == ["beat.json"] * 3
    assert (tmp_path / "supervise" / TOKEN / "beat.json").stat().st_size < 64


def test_a_new_attempt_spec_is_read_once(tmp_path: Path, read: list[str]) -> None:
    writer, reader = RendezvousStore(tmp_path, TOKEN), RendezvousStore(tmp_path, TOKEN)
    for attempt in (1, 2, 3):
        writer.publish(AttemptSpec(attempt=attempt))
        read.clear()
        for _ in range(2):
            spec = reader.attempt_spec()
            assert spec is not None and spec.attempt == attempt
        assert read == ["beat.json", "plan.json", "beat.json"]


def test_a_spec_without_its_beat_is_not_followed_yet(tmp_path: Path) -> None:
    """The disk was full between the two writes: the old spec is valid until rank 0 has written both."""
    writer, reader = RendezvousStore(tmp_path, TOKEN), RendezvousStore(tmp_path, TOKEN)
    writer.publish(SPEC)
    assert reader.attempt_spec() is not None
    plan = tmp_path / "supervise" / TOKEN / "plan.json"
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "attempt": 2, "version": 2}))
    spec = reader.attempt_spec()
    assert spec is not None and spec.attempt == 1
    writer.publish(AttemptSpec(attempt=2))
    spec = reader.attempt_spec()
    assert spec is not None and spec.attempt == 2


def test_deleted_files_are_missed(tmp_path: Path) -> None:
    writer, reader = RendezvousStore(tmp_path, TOKEN), RendezvousStore(tmp_path, TOKEN)
    for name in ("plan.json", "beat.json"):
        writer.publish(SPEC)
        assert writer.has_attempt_spec
        (tmp_path / "supervise" / TOKEN / name).unlink()
        assert not writer.has_attempt_spec
    assert reader.attempt_spec() is None


@pytest.mark.parametrize("world", [1, 4, 64, 512, 4096, 16384])
def test_reads_of_all_ranks_together_are_limited(world: int) -> None:
    info = RankInfo(1, world, 1 % world, min(8, world), SINGLE)
    nodes = -(-world // info.local_world)
    seconds = read_seconds(info, has_worker=True, coordinates=False, shares_reads=True)
    assert nodes / seconds <= HEALTHY_READS_PER_SECOND * (1 + 1e-9) or seconds == LONGEST_SECONDS
    assert seconds == store_seconds(nodes, has_worker=True) <= LONGEST_SECONDS
    assert read_seconds(info, has_worker=True, coordinates=True, shares_reads=True) == STORE_SECONDS
    assert world / max(store_seconds(world, has_worker=False), POLL_SECONDS) <= READS_PER_SECOND


def test_few_ranks_read_as_often_as_one() -> None:
    assert store_seconds(64, has_worker=True) == STORE_SECONDS and store_seconds(100, has_worker=False) <= POLL_SECONDS


@pytest.mark.parametrize("world", [2, 4096, 16384])
def test_waiting_ranks_are_heard_before_they_count_as_lost(world: int) -> None:
    assert announce_seconds(world) + store_seconds(world, has_worker=False) < SILENT_SECONDS


def test_supervisors_of_a_node_read_the_store_once_together(tmp_path: Path, read: list[str]) -> None:
    (tmp_path / "supervise").mkdir()
    token = uuid.uuid4().hex
    writer = RendezvousStore(tmp_path, token)
    first, second = (RendezvousStore(tmp_path, token, NodeCopy(token)) for _ in range(2))
    try:
        writer.publish(SPEC)
        assert second.copied_spec(60.0) is None
        spec = first.attempt_spec()
        assert spec is not None and spec.members == SPEC.members
        read.clear()
        assert second.copied_spec(60.0) == spec and read == []
        assert second.copied_spec(0.0) is None  # too old: this process reads the store itself
        writer.publish(AttemptSpec(attempt=2))
        assert second.copied_spec(60.0) == spec
        assert second.attempt_spec().attempt == 2 and first.copied_spec(60.0).attempt == 2  # type: ignore[union-attr]
        assert read == ["beat.json", "plan.json"]
        second.copy.discard()  # type: ignore[union-attr]
        assert first.copied_spec(60.0) is None
    finally:
        NodeCopy(token).discard()


def test_a_copy_is_used_while_it_is_young_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a supervisor that was stopped after its read would hide the end of an attempt from its whole node."""
    copy, now = NodeCopy(uuid.uuid4().hex), time.monotonic()
    try:
        monkeypatch.setattr(time, "monotonic", lambda: now)
        copy.write_beat(Beat(version=3))
        for age, is_used in ((0.0, True), (0.9, True), (1.0, False), (-1.0, False)):  # in the future: of another boot
            monkeypatch.setattr(time, "monotonic", lambda age=age: now + age)
            assert (copy.beat(1.0) == Beat(version=3)) == is_used, age
    finally:
        copy.discard()


@pytest.fixture
def four_ranks(tmp_path: Path) -> Iterator[list[RendezvousStore]]:
    """The stores of four ranks in the first attempt, three of which are on one node."""
    (tmp_path / "supervise").mkdir()
    token = uuid.uuid4().hex
    stores = [RendezvousStore.shared(tmp_path, token) for _ in range(4)]
    members = {str(rank): "nonce" for rank in range(4)}
    stores[0].publish(AttemptSpec(1, members, order=(0, 1, 2, 3), hosts=("a", "a", "b", "a")))
    assert all(store.attempt_spec() is not None for store in stores)
    yield stores
    NodeCopy(token).discard()


def reports_in(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "supervise").glob("*/end-0001/*")}


def test_the_exit_reports_of_a_node_are_written_in_one_file(tmp_path: Path, four_ranks: list[RendezvousStore]) -> None:
    reports = [ExitReport(rank, "ab"[rank == 2], ("exit", "peer")[rank == 1], -9 * (rank == 1)) for rank in range(4)]
    for rank in (0, 2, 1):
        four_ranks[rank].report_exit(1, reports[rank])
    assert reports_in(tmp_path) == {"00002.json"}  # the only rank of its node
    four_ranks[3].report_exit(1, reports[3])
    for rank in range(4):
        four_ranks[rank].report_exit(1, reports[rank])
    assert reports_in(tmp_path) == {"00002.json", "node-00000.json"}
    assert four_ranks[0].exit_reports(1) == dict(enumerate(reports))
    (tmp_path / "supervise" / four_ranks[0].token / "end-0001" / "node-00000.json").unlink()
    four_ranks[1].report_exit(1, reports[1])  # any supervisor of the node repeats it
    assert "node-00000.json" in reports_in(tmp_path)


def test_a_report_that_ends_the_attempt_does_not_wait(tmp_path: Path, four_ranks: list[RendezvousStore]) -> None:
    failed = ExitReport(1, "a", "exit", 70)
    four_ranks[1].report_exit(1, failed)
    assert reports_in(tmp_path) == {"00001.json"} and four_ranks[0].exit_reports(1) == {1: failed}
    for rank in (0, 3):
        four_ranks[rank].report_exit(1, ExitReport(rank, "a", "peer", -9))
    assert reports_in(tmp_path) == {"00001.json", "node-00000.json"}


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_report_waits_a_limited_time_for_the_others_of_its_node(
    tmp_path: Path, four_ranks: list[RendezvousStore], monkeypatch: pytest.MonkeyPatch, is_lost: bool
) -> None:
    """A supervisor that is killed or stopped delays its node's reports, and hides none. So does memory that is full."""
    now, report = time.monotonic(), ExitReport(0, "a", "exit", 0)
    if not is_lost:
        monkeypatch.setattr(NodeCopy, "write_report", lambda *_: None)
    for later, there in ((0.0, set()), (NODE_SECONDS / 2, set()), (NODE_SECONDS + 0.1, {"00000.json"})):
        monkeypatch.setattr(time, "monotonic", lambda later=later: now + later)
        four_ranks[0].report_exit(1, report)
        assert reports_in(tmp_path) == there
    assert four_ranks[1].exit_reports(1) == {0: report}


def test_an_announcement_and_a_report_are_read_once(tmp_path: Path, read: list[str]) -> None:
    registry, coordinator = MemberRegistry(tmp_path), MemberRegistry(tmp_path)
    registry.open()
    member = Member(1, "1" * 32, "n0", 1, "digest")
    assert not registry.touch(member)
    registry.post(member)
    (before,) = coordinator.members()
    os.utime(next((tmp_path / "supervise" / "waiting").iterdir()), (1, 1))
    (after,) = coordinator.members()
    assert after.beats == 10**9 != before.beats and len(read) == 1
    replaced = replace(member, host="n1")
    registry.post(replaced)
    assert [each.host for each in coordinator.members()] == ["n1"] and len(read) == 2
    store = RendezvousStore(tmp_path, TOKEN)
    store.publish(SPEC)
    for rank in range(3):
        store.report_exit(1, ExitReport(rank, "n0", "exit", 0))
        read.clear()
        assert sorted(store.exit_reports(1)) == list(range(rank + 1)) and read == [f"{rank:05d}.json"]
    assert store.exit_reports(2) == {}
