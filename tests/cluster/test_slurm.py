"""`sbatch cluster/train.sbatch` on a real SLURM cluster: three nodes of two ranks train, are preempted, break, and continue."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sdit.config import load_config
from sdit.errors import ExitCode
from tests.cluster.runs import (
    ARGUMENTS,
    NODES,
    RANKS_PER_NODE,
    RUN_SECONDS,
    SLOWLY,
    STEPS,
    assert_same_losses,
    assert_same_run,
    checkpoint_at,
    commit_all,
    launch,
    wait_until,
)
from tests.cluster.slurm_cluster import SlurmCluster
from tests.distributed.harness import ROOT, numbers_of

pytestmark = pytest.mark.cluster
SCRIPT = str(ROOT / "cluster" / "train.sbatch")
UNFINISHED = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"}
SIGNAL_STEPS = (10, 15, 20, 25)  # when a run is disturbed
RANKS = NODES * RANKS_PER_NODE


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with SlurmCluster(NODES, RANKS_PER_NODE) as cluster:
        yield cluster


class Job:
    """A submitted `train.sbatch` and the folder of its run."""

    def __init__(self, cluster: SlurmCluster, folder: Path, *arguments: str, **variables: str) -> None:
        self._cluster, self._folder, self.run_dir = cluster, folder, folder / "run"
        settings = {
            "SDIT_ROOT": str(ROOT),
            "SDIT_PYTHON": sys.executable,
            "SDIT_RUN_DIR": str(self.run_dir),
            "SDIT_DOCTOR": "0",
        }
        options = (f"--nodes={NODES}", f"--ntasks-per-node={RANKS_PER_NODE}", "--parsable", f"--chdir={folder}")
        self.id = cluster.command("sbatch", *options, SCRIPT, *arguments, **{**settings, **variables}).strip()

    @property
    def output(self) -> str:
        return "".join(path.read_text() for path in sorted(self._folder.glob("*.out")))

    def field(self, name: str) -> str:
        return self._cluster.field(self.id, name)

    def wait(self, holds: Callable[[], object], what: str) -> None:
        """Wait while the job may still come to it; a job that has ended does not."""

        def held() -> bool:
            state = self.field("JobState")  # before the question: what the job did last counts
            if holds():
                return True
            assert state in UNFINISHED, f"{state}\n{self.output}"
            return False

        wait_until(held, RUN_SECONDS, what, lambda: self.output + self._cluster.logs())

    def finish(self, state: str = "COMPLETED", code: int = 0) -> None:
        """Wait for the job's end, which must be this one."""
        self.wait(lambda: self.field("JobState") == state, f"job to be {state}")
        assert self.field("ExitCode") == f"{code}:0", self.output


@pytest.fixture(scope="module")
def straight(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job that nothing disturbs; its ranks write down what they see of the environment."""
    folder = tmp_path_factory.mktemp("straight")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nenv > "{folder}/environment-$SLURM_PROCID"\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    seen = {"SDIT_EXPORT": "PASSED_ON", "PASSED_ON": "yes", "NCCL_DEBUG": "WARN", "HUB_TOKEN": "secret"}
    job = Job(cluster, folder, *ARGUMENTS, SDIT_PYTHON=str(python), SDIT_DOCTOR="1", **seen)
    job.finish()
    return job


def test_three_nodes_train_what_deepspeed_trains(straight: Job, reference: Path) -> None:
    where = f"rank 0 of {RANKS}, 0 of {RANKS_PER_NODE} on this node; found by SLURM; rendezvous at 127.0.0.1:"
    assert f"0: ranks: {where}" in straight.output
    assert json.loads((straight.run_dir / "environment.json").read_text())["ranks_found_by"] == "SLURM"
    assert_same_losses(straight.run_dir, reference)


def test_ranks_see_the_variables_they_need_and_no_others(straight: Job) -> None:
    for rank in range(RANKS):
        lines = (straight.run_dir.parent / f"environment-{rank}").read_text().splitlines()
        names = {line.partition("=")[0] for line in lines}
        assert {"PASSED_ON", "NCCL_DEBUG", "MASTER_ADDR", "OMP_NUM_THREADS", "SLURM_PROCID"} <= names
        assert not {"HUB_TOKEN", "SDIT_EXPORT", "SDIT_RUN_DIR"} & names


def test_job_that_is_preempted_and_broken_ends_as_if_nothing_had_happened(
    cluster: SlurmCluster, straight: Job, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path, *ARGUMENTS, *SLOWLY)
    disturbances = (
        lambda: cluster.command("scancel", "--signal=USR1", job.id),  # every task, as at a preemption
        lambda: cluster.command("scancel", "--batch", "--signal=USR1", job.id),  # the script, as before the time limit
        lambda: cluster.command("scontrol", "requeue", job.id),
        lambda: os.kill(task_of(job.id, rank=3), signal.SIGKILL),
    )
    for number, (step, disturb) in enumerate(zip(SIGNAL_STEPS, disturbances, strict=True)):
        job.wait(lambda step=step: checkpoint_at(job.run_dir, step).exists(), f"step {step}")
        assert len(numbers_of(job.run_dir)) < STEPS, "the run had ended before it was disturbed"
        disturb()
        job.wait(lambda number=number: job.field("Restarts") == str(number + 1), f"requeue {number + 1}")
    job.finish()
    assert job.field("Restarts") == str(len(disturbances))
    assert_same_run(job.run_dir, straight.run_dir)


def task_of(job: str, rank: int) -> int:
    """Process id of the task that SLURM started as a rank of a job's training."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
        ours = wanted <= set(variables) and b"launcher/train.py" in command
        if ours and not any(variable.startswith(b"SDIT_SUPERVISED=") for variable in variables):
            return int(folder.name)
    raise AssertionError(f"rank {rank} of job {job} does not run")


def test_crashes_without_progress_are_tried_again_a_bounded_number_of_times(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexit {int(ExitCode.CRASH)}\n")
    python.chmod(0o755)
    job = Job(cluster, tmp_path, SDIT_PYTHON=str(python), SDIT_RETRIES="1")
    job.finish("FAILED", ExitCode.CRASH)
    assert job.field("Restarts") == "1"
    assert "scontrol requeue" not in job.output


def test_impossible_config_is_not_tried_again(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, *ARGUMENTS, "train.global_batch=33")
    job.finish("FAILED", ExitCode.CONFIG)
    assert job.field("Restarts") == "0"
    assert f"error: train.global_batch: 33 is not a multiple of {RANKS} ranks" in job.output


def test_array_of_seeds_that_was_submitted_keeps_them_apart(cluster: SlurmCluster, tmp_path: Path) -> None:
    checkout = commit_all(tmp_path / "checkout")
    (checkout / "README.md").open("a").write("not committed\n")
    submit = (sys.executable, str(checkout / "launcher" / "submit.py"), "--run-dir", str(tmp_path / "run"))
    layout = ("--nodes", "2", "--ranks-per-node", "1", "--array", "1-2", "--set", "SDIT_DOCTOR=0")
    output = launch(*submit, *layout, *ARGUMENTS, SLURM_CONF=cluster.environment["SLURM_CONF"])
    job = output.strip().rpartition(" ")[2]
    wait_until(lambda: not UNFINISHED & cluster.states(job), RUN_SECONDS, "both seeds", cluster.logs)
    logs = sorted((tmp_path / "run" / "logs").glob("*.out"))
    assert cluster.states(job) == {"COMPLETED"}, "".join(log.read_text() for log in logs)
    seeds = [tmp_path / "run" / f"seed-{seed}" for seed in (1, 2)]
    assert [load_config(run / "config.yaml").seed for run in seeds] == [1, 2]
    curves = [numbers_of(run) for run in seeds]
    assert [[step["step"] for step in curve] for curve in curves] == [list(range(1, STEPS + 1))] * 2
    assert all(one["loss"] != other["loss"] for one, other in zip(*curves, strict=True))
    frozen = tmp_path / "run" / "submit" / "001"
    facts = json.loads((frozen / "commit.json").read_text())
    assert facts["uncommitted_changes"] and (frozen / "code" / "README.md").read_text().endswith("not committed\n")
    assert {commit_of(run) for run in seeds} == {facts["frozen_commit"]}


def commit_of(run_dir: Path) -> str:
    """The commit of the code that a run was made with."""
    return json.loads((run_dir / "environment.json").read_text())["git_commit"]
