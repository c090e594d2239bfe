"""What a step tells of itself: losses by timestep, sums over ranks, where the time went, memory."""

from __future__ import annotations

import time

import pytest
import torch

from sdit.train.rank_work import work_share
from sdit.train.sums import BINS, FLAGS, bin_means, bin_sums, host_share, pack, timestep_bins, unpack
from sdit.train.sums import PARTS as LOSSES
from sdit.train.timing import PHASES, StepTimer, memory_bytes


@pytest.mark.parametrize("continuous", [False, True])
def test_losses_fall_into_the_bin_of_their_timestep(continuous: bool) -> None:
    t = torch.tensor([0, 49, 50, 999, 999])
    bins = timestep_bins(t / 1000 if continuous else t, 1000)
    sums = bin_sums(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), bins)
    means = bin_means(sums)
    assert len(means) == BINS and (means[0], means[1], means[-1]) == (1.5, 4.0, 12.0)
    assert means[2:-1] == [None] * (BINS - 3)


def test_what_is_packed_comes_out_under_its_name() -> None:
    bins = torch.arange(2 * BINS, dtype=torch.float64).view(2, BINS)
    parts = torch.arange(len(LOSSES), dtype=torch.float64)
    flags = tuple(float(number) for number in range(10, 10 + len(FLAGS)))
    share = pack(parts, torch.tensor(9.0, dtype=torch.float64), host_share(flags), bins)
    sums = unpack(share * 2)  # two ranks with the same share
    assert sums.parts == (2 * parts).tolist() and sums.grad_norm == 18**0.5
    assert sums.flags == {name: 2 * value for name, value in zip(FLAGS, flags, strict=True)}
    assert torch.equal(sums.bins, 2 * bins)
    assert sums.work is None and not len(sums.tokens)
    tokens, work = torch.arange(5, dtype=torch.float64), work_share(0.25)
    logged = pack(parts, torch.tensor(9.0, dtype=torch.float64), host_share(flags, work), bins, tokens)
    logged_sums = unpack(logged * 2, has_work=True)
    assert logged_sums.work is not None and torch.equal(logged_sums.work, 2 * work)
    assert logged_sums.flags == sums.flags and torch.equal(logged_sums.tokens, 2 * tokens)
    traffic = sums.traffic(world=2)
    assert traffic["exchange_bytes"] == sum(sums.flags[name] for name in ("tokens", "weights", "samples"))
    assert traffic["exchange_wait_seconds"] == sums.flags["waited_seconds"] / 2


def test_gradient_norm_of_a_bad_sum_is_no_number() -> None:
    bad = torch.tensor(float("nan"), dtype=torch.float64)
    host = host_share((0.0,) * len(FLAGS))
    share = pack(torch.zeros(len(LOSSES), dtype=torch.float64), bad, host, torch.zeros(2, BINS))
    assert unpack(share).grad_norm != unpack(share).grad_norm


def test_time_counts_for_the_part_it_was_spent_in() -> None:
    times = StepTimer(torch.device("cpu"))
    with times.phase("checkpoint"):
        time.sleep(0.01)
    with pytest.raises(ValueError), times.phase("data_wait"):
        time.sleep(0.01)
        raise ValueError
    taken = times.take_phases()
    assert min(taken["checkpoint_seconds"], taken["data_wait_seconds"]) >= 0.01
    assert taken["pause_seconds"] == taken["checkpoint_seconds"]  # waiting for data is no pause
    assert set(taken) == {f"{name}_seconds" for name in (*PHASES, "pause")}
    assert set(times.take_phases().values()) == {0.0}


def test_resident_memory_grows_with_what_is_touched() -> None:
    before = memory_bytes(torch.device("cpu"))
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    after = memory_bytes(torch.device("cpu"))
    assert before["device"] == after["device"] == 0
    assert 0.9 * len(block) <= after["resident"] - before["resident"] <= 2 * len(block)


def test_gpu_memory_is_read_once_and_has_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    stats = {
        "allocated_bytes.all.current": 3,
        "allocated_bytes.all.peak": 7,
        "reserved_bytes.all.current": 8,
        "num_ooms": 0,
    }
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: calls.append(device) or stats)
    found = memory_bytes(torch.device("cuda", 0))
    assert found.pop("resident") > 0 and found == {"device": 3, "device_peak": 7, "device_reserved": 8}
    assert calls == [torch.device("cuda", 0)]
