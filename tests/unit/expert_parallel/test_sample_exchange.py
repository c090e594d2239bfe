"""Law of the exchange of samples: a rank gets the batch that it would have loaded and drawn itself for the same indices."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdit.contracts import Batch
from sdit.expert_parallel.all_to_all import exchange_samples
from sdit.expert_parallel.assignment import plan_sample_exchange
from sdit.randomness import Purpose, normal_noise

RANKS, PER_RANK, SHAPE = 3, 4, (2, 3, 3)


class ThreadGroup:
    """A group whose ranks are threads: each leaves its rows for the others, waits, and takes what was sent to it."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(RANKS)
        self._sent: dict[tuple[int, int], Tensor] = {}

    def of_rank(self, rank: int) -> Any:
        group = self

        class OfRank:
            def send(self, rows: Tensor, send: list[int], receive: list[int], mode: str) -> tuple[Tensor, None]:
                assert mode == "samples"
                for target, part in enumerate(rows.split(send)):
                    group._sent[rank, target] = part
                group._barrier.wait(timeout=60)
                parts = [group._sent[source, rank] for source in range(RANKS)]
                assert [len(part) for part in parts] == receive
                return torch.cat(parts), None

            def wait(self, work: None) -> None:
                pass

        return OfRank()


def drawn(index: np.ndarray, continuous: bool) -> Batch:
    """The batch of some run indices: each value is a function of its index."""
    t = torch.from_numpy(index * 37 % 1000)
    return Batch(
        index=torch.from_numpy(index),
        x0=torch.from_numpy(normal_noise(1, index, SHAPE, Purpose.SAMPLE_START)),
        noise=torch.from_numpy(normal_noise(1, index, SHAPE, Purpose.NOISE)),
        t=t.float() / 1000 if continuous else t,
        y=torch.from_numpy(index % 1001),
    )


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_noise_times_and_labels_follow_the_sample(seed: int, continuous: bool) -> None:
    first, total = 2**40, RANKS * PER_RANK
    source = np.arange(total) % RANKS
    assigned = np.random.default_rng(seed).permutation(source)
    group = ThreadGroup()

    def run(rank: int) -> Batch:
        exchange = plan_sample_exchange(source, assigned, RANKS, rank)
        loaded = drawn(first + np.flatnonzero(source == rank), continuous)
        return exchange_samples(group.of_rank(rank), exchange, loaded, first + np.flatnonzero(assigned == rank))

    with ThreadPoolExecutor(RANKS) as pool:
        for rank, batch in enumerate(pool.map(run, range(RANKS))):
            expected = drawn(first + np.flatnonzero(assigned == rank), continuous)
            for name in ("index", "x0", "noise", "t", "y"):
                mine, plain = getattr(batch, name), getattr(expected, name)
                assert mine.dtype == plain.dtype and mine.is_contiguous() and torch.equal(mine, plain), name
