"""Token-routed experts on four ranks equal dense computation, for any routing, and send each token once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import fork_ranks
from tests.distributed.token_exchange_worker import SCENARIOS

WORKER = Path(__file__).with_name("token_exchange_worker.py")
ROUTINGS, ALL_ROUTINGS = 120, 500
ROUNDING = 2.0**-53  # of float64
# Terms of a gradient: at most 44 tokens x 12 experts x 12 hidden channels, twice through the blocks.
LONGEST_SUM = 44 * 12 * 12 * 2


def check_routings(folder: Path, first: int, stop: int) -> list[dict[str, Any]]:
    """Let four ranks check the routings of these seeds. A hang ends at the time limit as a failure."""
    for result in fork_ranks(4, WORKER, [folder, first, stop], timeout_seconds=600):
        assert result.returncode == 0, result.stdout[-1000:]
    found: list[dict[str, Any]] = json.loads((folder / "routings.json").read_text())
    return found


def assert_equal_to_dense(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert max(row["errors"].values()) <= LONGEST_SUM * ROUNDING, row
        assert not any(row["surplus_bytes"]), row


def test_any_routing_equals_dense_computation_and_sends_a_token_once_to_a_rank(tmp_path: Path) -> None:
    rows = check_routings(tmp_path, 0, ROUTINGS)
    assert len(rows) == ROUTINGS
    cases = {(row["scenario"], row["recompute"], row["bounded"]) for row in rows}
    assert len(cases) == 4 * len(SCENARIOS)
    assert_equal_to_dense(rows)


@pytest.mark.slow
def test_more_routings_equal_dense_computation(tmp_path: Path) -> None:
    assert_equal_to_dense(check_routings(tmp_path, ROUTINGS, ALL_ROUTINGS))
