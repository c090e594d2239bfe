"""Collectives of few ranks, and reports of the first ranks, agree with lists of all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.harness import fork_ranks


@pytest.mark.parametrize("world", [1, 2, 3])
def test_collectives_that_do_not_grow_agree_with_lists_of_all_ranks(world: int) -> None:
    for result in fork_ranks(world, Path(__file__).with_name("comm_worker.py"), []):
        assert result.returncode == 0, result.stdout[-1000:]
