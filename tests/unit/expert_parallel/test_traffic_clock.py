"""Waiting for transfers is timed by the clock of whoever waits: the host, or the GPU's stream."""

from __future__ import annotations

import time

import pytest
import torch

from sdit.expert_parallel.all_to_all import MEASURED_STEPS, TrafficCounter


class FakeEvent:
    """Stands for a CUDA event: `now` milliseconds of the device's clock, come to pass once the stream is `done`."""

    now, done, made = 0.0, False, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        FakeEvent.made += 1

    def record(self) -> None:
        self.at = FakeEvent.now

    def query(self) -> bool:
        return FakeEvent.done

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def wait_on_gpu(traffic: TrafficCounter) -> None:
    """Let the stream of a GPU wait for 3 ms and, later, for 5 ms."""
    for begin, end in ((10.0, 13.0), (20.0, 25.0)):
        FakeEvent.now = begin
        with traffic.waiting():
            FakeEvent.now = end


@pytest.fixture
def stalled(monkeypatch: pytest.MonkeyPatch) -> TrafficCounter:
    """A GPU in the first step that is measured."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "now", 0.0)
    monkeypatch.setattr(FakeEvent, "done", False)
    monkeypatch.setattr(FakeEvent, "made", 0)
    traffic = TrafficCounter("cuda")
    assert traffic.take() == ({}, 0.0)
    wait_on_gpu(traffic)
    return traffic


def test_a_gpus_wait_is_counted_once_its_stream_has_passed_it(stalled: TrafficCounter) -> None:
    assert stalled.take() == ({}, 0.0)
    FakeEvent.done = True
    assert stalled.take() == ({}, pytest.approx(0.008))


def test_one_of_ten_steps_of_a_gpu_is_measured_and_the_others_repeat_it(stalled: TrafficCounter) -> None:
    FakeEvent.done = True
    for _ in range(2 * MEASURED_STEPS):
        assert stalled.take()[1] == pytest.approx(0.008)
        wait_on_gpu(stalled)
    assert FakeEvent.made == 3 * 4  # events of three measured steps


def test_waits_of_held_out_images_are_left_out(stalled: TrafficCounter) -> None:
    stalled.add("tokens", 7)
    stalled.forget()
    FakeEvent.done = True
    assert stalled.take() == ({}, 0.0)


def test_a_host_counts_its_own_wait_and_bytes_by_mode() -> None:
    traffic = TrafficCounter()
    with traffic.waiting():
        time.sleep(0.01)
    for _ in range(2):
        traffic.add("tokens", 5)
    traffic.add("weights", 3)
    sizes, seconds = traffic.take()
    assert sizes == {"tokens": 10, "weights": 3} and seconds >= 0.01
    assert traffic.take() == ({}, 0.0)
