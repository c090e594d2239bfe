"""What the supervisors of a large launch read from the shared file system."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sdit.supervise import rendezvous
from sdit.supervise.rendezvous import AttemptSpec, RendezvousStore
from sdit.supervise.supervisor import POLL_SECONDS, READS_PER_SECOND, STORE_SECONDS, store_seconds

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

    monkeypatch.setattr(rendezvous, "read_json", counted)
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
    assert world / store_seconds(world, has_worker=True) <= READS_PER_SECOND
    assert world / max(store_seconds(world, has_worker=False), POLL_SECONDS) <= READS_PER_SECOND


def test_few_ranks_are_read_as_often_as_before() -> None:
    assert store_seconds(500, has_worker=True) == STORE_SECONDS and store_seconds(100, has_worker=False) <= POLL_SECONDS
