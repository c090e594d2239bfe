"""Nodes with different numbers of ranks, as SLURM gives them, and as they remain after a node was lost."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sdit.errors import ExitCode
from tests.distributed.harness import rank_environments
from tests.faults.ranks import LAUNCHER, Ranks

TINY = Path(__file__).parents[1] / "distributed" / "tiny.yaml"


def test_ranks_that_would_choose_another_ep_train_together(tmp_path: Path) -> None:
    """Rank 0 sees two ranks on its node and rank 1 only itself. EP must be the same on both, or they wait for each other."""
    environments = rank_environments(2)
    environments[1] |= {"LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    command = [
        sys.executable,
        str(LAUNCHER),
        "--config",
        str(TINY),
        "--run-dir",
        str(tmp_path / "run"),
        "train.steps=2",
    ]
    settings = ["parallel.expert=auto", "supervise.restarts=0", "supervise.first_step_seconds=60"]
    with Ranks(2, [*command, *settings], tmp_path / "log", environments=environments) as ranks:
        assert ranks.codes() == [ExitCode.DONE] * 2, ranks.output
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["text"].count("EP 1, ") for event in events if event["event"] == "layout"] == [1]
