"""Whose fault it was and what follows, and when numbers count as bad: pure functions."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import asdict, replace

import pytest
import torch

from sdit.clock import Clock
from sdit.errors import ExitCode
from sdit.launch_environment import find_rank
from sdit.supervise.heartbeat import Heartbeat, Phase
from sdit.supervise.restart_policy import ExitReport, RestartPolicy, root_cause
from sdit.train.guards import SPIKE_MEMORY_STEPS, BadStepGuard, SpikeDetector, StopSignals
from sdit.train.timing import StepTimer
from tests.faults.injection import Fault


def end(rank: int, cause: str = "exit", code: int = 0, **more: object) -> ExitReport:
    return ExitReport(rank, "host", cause, code, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ends", "rank"),
    [
        ([end(0, code=70, secondary=True), end(1, code=-9), end(2, "peer", -9)], 1),
        (
            [
                end(0, "stall", -9, progress=7),
                end(1, "stall", -9, progress=7, frozen=True),
                end(2, "peer", -9, progress=7),
            ],
            1,
        ),
        ([end(0, code=70, secondary=True, progress=9), end(1, "peer", -9, progress=9, frozen=True)], 1),
        ([end(0, "stall", -9, progress=9), end(1, "stall", -9, progress=8), end(2, "stall", -9, progress=9)], 1),
        ([end(0, "peer", -9, progress=9), end(1, "lost", 70), end(2, code=70, secondary=True)], 1),
        ([end(0), end(1, code=70), end(2)], 1),
    ],
)
def test_fault_lies_with_the_rank_that_the_others_waited_for(ends: list[ExitReport], rank: int) -> None:
    assert root_cause(ends).rank == rank
    assert root_cause(ends[::-1]).rank == rank


def test_a_crash_is_no_deterministic_error_when_its_text_differs() -> None:
    judge = RestartPolicy(restarts=1, stop_code=75)
    judge.begin("")
    assert judge.decide({0: end(0, code=70, text="a", step=3)}, "", False).restart
    assert judge.decide({0: end(0, code=70, text="b", step=3)}, "", False).code == ExitCode.CRASH


def test_a_user_s_mistake_is_told_in_the_rank_s_own_words() -> None:
    decision = RestartPolicy(3, 75).decide({0: end(0, code=78, text="train.steps: is not set")}, "", False)
    assert (decision.restart, decision.code, decision.text) == (False, 78, "train.steps: is not set")


def test_rank_is_read_from_whatever_launched_it() -> None:
    srun = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2"}
    mpi = {f"OMPI_COMM_WORLD_{name}": value for name, value in (("RANK", "2"), ("SIZE", "4"), ("LOCAL_RANK", "0"))}
    deepspeed = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    read = [
        (info.rank, info.world, info.local_rank, info.local_world)
        for info in map(find_rank, ({}, {**srun, "SLURM_STEP_ID": "0"}, mpi, deepspeed, srun))
    ]
    # inside sbatch but not below srun there is one process, whatever was allocated
    assert read == [(0, 1, 0, 1), (3, 8, 1, 2), (2, 4, 0, 1), (1, 2, 1, 2), (0, 1, 0, 1)]


def test_heartbeat_is_seen_through_another_mapping_of_its_memory() -> None:
    parent = Heartbeat.create()
    child = Heartbeat(os.dup(parent.descriptor))
    child.enter(Phase.CHECKPOINT, 1 << 40)
    child.progress()
    child.fail("ä" * 10_000, secondary=True)
    state, failure = parent.read(), parent.failure()
    assert (state.phase, state.step, state.progress) == (Phase.CHECKPOINT, 1 << 40, 2)
    assert failure is not None and failure.secondary and failure.text.startswith("äää")
    assert not child.stop_requested
    parent.request_stop()
    assert child.stop_requested and parent.read() == state


def test_a_stop_is_heard_by_signal_and_by_heartbeat() -> None:
    for ask in (lambda pulse: pulse.request_stop(), lambda _: signal.raise_signal(signal.SIGUSR1)):
        pulse = Heartbeat()
        signals = StopSignals(pulse)
        try:
            assert not signals.requested
            ask(pulse)
            assert signals.requested
        finally:
            signals.close()


def test_a_spike_is_told_from_a_slow_rise() -> None:
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0)).tolist()
    rising = SpikeDetector(deviations=8.0)
    assert not any(rising.observe(1.0 + 0.05 * n + step * 1e-3) for step, n in enumerate(noise))
    steady = SpikeDetector(deviations=8.0)
    for n in noise[: 2 * SPIKE_MEMORY_STEPS]:
        steady.observe(1.0 + 0.05 * n)
    assert steady.observe(20.0)


def test_bad_steps_in_a_row_are_a_problem_and_a_good_one_forgives() -> None:
    guard = BadStepGuard(max_bad_steps=2)
    for value, in_a_row in ((math.nan, 1), (1.0, 0), (math.inf, 1)):
        assert guard.accept(1.0, value) == (in_a_row == 0)
        assert guard.in_a_row == in_a_row and guard.problem == ""
    guard.accept(math.nan)
    assert guard.problem.startswith("train.max_bad_steps: 2 steps in a row")


def test_samples_that_were_left_out_are_passed_over_once_and_for_all() -> None:
    clock = Clock(images_seen=64, steps=2)
    assert clock.first_sample == 64
    clock = clock.leaving_out(160)  # 64..159
    assert clock.left_out == ((64, 96),) and clock.first_sample == 160 and clock.sample_at(32) == 32
    later = replace(clock, images_seen=96).leaving_out(300)  # the second time from sample 192 on
    assert later.left_out == ((64, 96), (192, 108)) and later.first_sample == 300
    assert Clock.from_json(json.loads(json.dumps(asdict(later)))) == later


def test_work_is_averaged_over_steps_and_begins_anew() -> None:
    timer = StepTimer(torch.device("cpu"))
    for number in range(2):
        with timer.host_work(), timer.device_work():
            pass
        assert timer.work_seconds == 0.0 or number  # the present step does not count
        timer.end_step()
    assert 0.0 < timer.work_seconds < 1.0
    with timer.host_work():
        pass
    timer.forget_work()
    assert timer.work_seconds == 0.0
    timer.end_step()
    assert timer.work_seconds > 0.0


@pytest.mark.parametrize("text", ["kill", "kill@1", "kill@x:1", "nuke@1:1", "kill@1:1?"])
def test_unknown_fault_is_refused_with_what_is_legal(text: str) -> None:
    with pytest.raises(ValueError, match="kind@rank:step"):
        Fault.parse(text)
