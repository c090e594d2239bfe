"""Starts ranks as real processes on loopback and reads what their runs left."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from sdit.checkpoint.find import find_checkpoint
from sdit.checkpoint.shard_set import ShardSet
from sdit.observe.metrics_file import read_metrics
from tests.distributed.forks import fork_script
from tests.stored_tensors import stored_tensor

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
TIMEOUT_SECONDS = 600  # ends ranks that hang; the longest group of cases takes 200 s on two quiet cores


def case(run_dir: Path, config: Path, *overrides: str, stage: int = 1, **more: object) -> dict:
    """One training run for `train_together`."""
    return {"run_dir": str(run_dir), "config": str(config), "overrides": list(overrides), "stage": stage, **more}


def rank_environments(world: int) -> list[dict[str, str]]:
    """The environment of each rank, as a launcher on one host would set it."""
    port = str(_free_port())
    common = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    shared = {"WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)}
    return [{**common, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def _free_port() -> int:
    """A port that nobody listens on, below those the system hands out: ranks connect seconds later, and gloo takes many."""
    for port in random.sample(range(15_000, 30_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("100 ports in a row were taken")


def run_ranks(
    world: int, command: list[str], timeout_seconds: float = TIMEOUT_SECONDS
) -> list[subprocess.CompletedProcess]:
    """Run `command` as `world` ranks and return every rank's result; all are ended at the time limit."""
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for environment in rank_environments(world)
    ]
    deadline = time.monotonic() + timeout_seconds
    results = []
    try:
        for process in processes:
            try:
                output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                output = f"{process.communicate()[0]}\n(ended after {timeout_seconds} s)"
            results.append(subprocess.CompletedProcess(command, process.returncode, output))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return results


def fork_ranks(
    world: int, script: Path, words: Sequence[object], timeout_seconds: float = TIMEOUT_SECONDS
) -> list[subprocess.CompletedProcess]:
    """The same for `python script words`, without the time of the imports: the ranks fork from a prepared process."""
    arguments = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"rank-{rank}.log") for rank in range(world)]
        deadline = time.monotonic() + timeout_seconds
        ranks = [fork_script(script, arguments, *each) for each in zip(rank_environments(world), logs, strict=True)]
        try:
            for rank, log in zip(ranks, logs, strict=True):
                rank.join(max(1.0, deadline - time.monotonic()))
                if rank.exitcode is None:
                    rank.kill()
                    rank.join()
                    log.open("a").write(f"\n(ended after {timeout_seconds} s)")
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        texts = [log.read_text() if log.exists() else "" for log in logs]
    command = [str(script), *arguments]
    return [subprocess.CompletedProcess(command, rank.exitcode, text) for rank, text in zip(ranks, texts, strict=True)]


def train_together(world: int, cases: list[dict], folder: Path, limit_seconds: float = TIMEOUT_SECONDS) -> None:
    """Train the cases one after another in one process group of `world` ranks."""
    listing = folder / f"cases-{world}.json"
    listing.write_text(json.dumps(cases))
    results = fork_ranks(world, WORKER, [listing], limit_seconds)
    failed = [(rank, result) for rank, result in enumerate(results) if result.returncode]
    # The rank that failed first says why; the others only that it went away.
    failed.sort(key=lambda each: "by peer" in each[1].stdout)
    logs = [f"rank {rank} ended with {result.returncode}:\n{result.stdout[-3000:]}" for rank, result in failed]
    assert not logs, "\n".join(logs)


def metrics_of(run_dir: Path) -> list[dict]:
    """All logged steps of a run."""
    return read_metrics(run_dir)


MACHINE_KEYS = (
    "images_per_second",
    "slowest_rank",
    "memory_bytes",
    "skipped_steps",
    "spent_since_logged",
    "bad_samples_by_reason",
    "planned_ahead_fraction",  # the first step of a process is not planned ahead
)


def numbers_of(run_dir: Path) -> list[dict]:
    """All logged steps without what the machine had to do with: times, memory, attempts."""

    def is_of_the_run(key: str) -> bool:
        return key not in MACHINE_KEYS and "_seconds" not in key

    return [{key: value for key, value in record.items() if is_of_the_run(key)} for record in metrics_of(run_dir)]


def tensors_of(run_dir: Path, kind: str) -> dict[str, torch.Tensor]:
    """Every logical tensor of a kind in the run's newest checkpoint."""
    found = find_checkpoint(run_dir)
    with ShardSet(found.folder, found.manifest) as shards:
        return {name: stored_tensor(shards, f"{kind}/{name}") for name in shards.names(kind)}
