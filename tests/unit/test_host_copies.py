"""Copies of state to the host. A CPU plays the device: only the choice by device type is replaced."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdit import transfers
from sdit.checkpoint.files import read_manifest
from sdit.checkpoint.saver import Saver
from sdit.checkpoint.shard_set import ShardSet
from sdit.checkpoint.store import CheckpointStore, Snapshot
from sdit.config import CheckpointConfig
from sdit.distributed.comm import Comm
from sdit.transfers import MAX_GAP, HostCopies
from tests.faults.test_checkpoint_faults import OneRank
from tests.stored_tensors import stored_tensor


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tensors count as those of a device."""
    monkeypatch.setattr(transfers, "_is_away", lambda _: True)


class Copies(TorchDispatchMode):
    """Counts copies."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


def views() -> list[torch.Tensor]:
    """Views of two flat tensors in mixed order, with a gap, and one tensor of its own."""
    flat, moments = torch.arange(100.0), torch.arange(200.0, 300.0)
    return [flat[50:90], moments[3:10], flat[:50], torch.full((4,), 7.0), moments[20:100]]


@pytest.mark.usefixtures("away")
def test_each_flat_tensor_is_copied_once_into_memory_that_is_kept() -> None:
    copies, state = HostCopies(), views()
    with Copies() as counted:
        first = copies.begin(state)
    first.wait()
    assert counted.count == 3
    for host, view in zip(first.tensors, state, strict=True):
        assert torch.equal(host, view) and host.data_ptr() != view.data_ptr()
    before = [host.data_ptr() for host in first.tensors]
    for view in state:
        view += 1
    second = copies.begin(state)
    assert [host.data_ptr() for host in second.tensors] == before
    assert all(torch.equal(host, view) for host, view in zip(second.tensors, state, strict=True))


@pytest.mark.usefixtures("away")
def test_distant_ranges_of_one_tensor_are_copied_apart() -> None:
    flat = torch.arange(float(MAX_GAP + 100))
    with Copies() as counted:
        copied = HostCopies().begin([flat[:10], flat[MAX_GAP + 50 :]])
    assert counted.count == 2 and sum(host.numel() for host in copied.tensors) == 60
    assert torch.equal(copied.tensors[1], flat[MAX_GAP + 50 :])


def test_nothing_is_copied_on_a_cpu() -> None:
    state = views()
    with Copies() as counted:
        pending = HostCopies().begin(state)
    assert counted.count == 0
    assert [host.data_ptr() for host in pending.tensors] == [view.data_ptr() for view in state]


@pytest.mark.parametrize("is_live", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_writer_waits_for_the_copies(tmp_path: Path, asynchronous: bool, is_live: bool) -> None:
    """The values arrive in `wait` only, as those of a GPU do."""
    values, waits = np.zeros(64, np.float32), []

    def arrive() -> None:
        waits.append(True)
        values[:] = 3.0

    facts = {"clock": {"images_seen": 8, "steps": 1}, "config": {}}
    snapshot = Snapshot(8, {"weight/w@0": values}, {"weight/w": (64,)}, facts, is_live, arrive)
    comm = cast(Comm, OneRank())
    store = CheckpointStore(tmp_path, CheckpointConfig(), comm)
    saver = Saver(store, comm, lambda: snapshot, asynchronous, lambda *_: None, pytest.fail)
    saver.save()
    saver.finish()
    folder = store.folder_of(8)
    with ShardSet(folder, read_manifest(folder)) as shards:
        assert waits and torch.equal(stored_tensor(shards, "weight/w"), torch.full((64,), 3.0))
