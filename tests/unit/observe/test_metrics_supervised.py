"""Metrics of real supervisors whose ranks are fakes (no torch): over restarts, while a rank is frozen, and at the end.

Run as a program, this file is such a rank: test_metrics_supervised.py RUN_DIR PORT STEPS FAULT
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from sdit.config import ObserveConfig, SuperviseConfig
from sdit.errors import ExitCode
from sdit.launch_environment import find_rank
from sdit.metrics.shared_file import PREFIX, SharedMetricsWriter, shared_folder
from sdit.supervise.heartbeat import Phase
from sdit.supervise.job import Job
from sdit.supervise.start import supervise
from sdit.supervise.worker import WorkerContext

if TYPE_CHECKING:
    from tests.faults.ranks import Ranks

SERIES = [("sdit_steps_total", ()), ("sdit_images_total", ()), ("sdit_step_seconds", ())]
STEP_SECONDS = 0.02


def train(steps: int, fault: str, rank: WorkerContext) -> int:
    """Count steps on the page; at step 20 of the first attempt rank 1 is killed, or holds Python's lock for 5 s."""
    writer = SharedMetricsWriter(rank.metrics_path, SERIES[: 3 if os.environ["RANK"] == "0" else 0])
    for step in range(steps):
        rank.heartbeat.enter(Phase.STEP, step)
        time.sleep(STEP_SECONDS)
        if os.environ["RANK"] == "0":
            writer.add("sdit_steps_total", 1)
            writer.observe("sdit_step_seconds", STEP_SECONDS)
            writer.publish()
        elif step == 20 and rank.attempt == 1 and fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif step == 20 and rank.attempt == 1 and fault == "gil":
            ctypes.PyDLL(None).sleep(5)
        if rank.heartbeat.stop_requested:
            return ExitCode.REQUEUE
    return ExitCode.DONE


def main() -> int:
    run_dir, port, steps, fault = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    rank = WorkerContext.from_environment(os.environ)
    if rank.is_supervised:
        return train(steps, fault, rank)
    observe = ObserveConfig(metrics_port=port)
    job = Job([sys.executable, *sys.orig_argv[1:]], run_dir, "same", lambda ranks: ranks, observe)
    return supervise(job, SuperviseConfig(), find_rank(os.environ), os.environ)


def scrape(port: int) -> dict[str, float]:
    """Series -> value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def start(run_dir: Path, steps: int, fault: str) -> tuple[Ranks, int]:
    """Two supervised ranks of this file, and the port of their exporter."""
    from tests.cluster.runs import free_ports
    from tests.faults.ranks import Ranks  # not for the ranks: it imports torch

    run_dir.mkdir()
    (port,) = free_ports(1)
    command = [sys.executable, __file__, str(run_dir), str(port), str(steps), fault]
    return Ranks(2, command, run_dir.with_suffix(".log")), port


def test_counters_never_fall_over_a_restart_and_nothing_is_left_at_the_end(tmp_path: Path) -> None:
    from tests.faults.ranks import eventually

    ranks, port = start(tmp_path / "run", 150, "kill")
    seen: list[dict[str, float]] = []

    def goes_on_after_its_restart() -> bool:
        seen.append(scrape(port))
        return seen[-1]["sdit_restarts_total"] == 1 and seen[-1].get("sdit_steps_total", 0) > 100

    with ranks:
        eventually(goes_on_after_its_restart)
        (plan,) = tmp_path.rglob("plan.json")
        nonces = list(json.loads(plan.read_text())["members"].values())
        pages = [shared_folder() / f"{PREFIX}{nonce}" for nonce in nonces]
        assert len(pages) == 2 and all(page.exists() for page in pages)
        assert ranks.codes() == [ExitCode.DONE] * 2
    for before, after in itertools.pairwise(seen):
        for name in before:
            if name.partition("{")[0].endswith(("_total", "_count", "_bucket")):
                assert after[name] >= before[name], name
    last = seen[-1]
    assert last['sdit_rank_ends_total{cause="exit",rank="1"}'] == 1
    assert last['sdit_rank_ends_total{cause="peer",rank="0"}'] == 1
    assert not any(page.exists() for page in pages)
    assert list((tmp_path / "run" / "targets").iterdir()) == []


def test_rank_that_holds_pythons_lock_is_seen_to_age_by_an_exporter_that_answers(tmp_path: Path) -> None:
    from tests.faults.ranks import eventually

    ranks, port = start(tmp_path / "run", 1000, "gil")
    with ranks:
        eventually(lambda: is_frozen(scrape(port)))
        eventually(lambda: scrape(port)['sdit_rank_tick_age_seconds{rank="1"}'] < 1.5)
        ranks.send(0, signal.SIGTERM)
        ranks.send(1, signal.SIGTERM)
        assert ranks.codes() == [ExitCode.REQUEUE] * 2


def is_frozen(now: dict[str, float]) -> bool:
    ages = [now[f'sdit_rank_{kind}_age_seconds{{rank="1"}}'] for kind in ("heartbeat", "tick")]
    return min(ages) > 2 and now['sdit_rank_up{rank="1"}'] == now['sdit_run_state{state="training"}'] == 1


if __name__ == "__main__":
    sys.exit(main())
