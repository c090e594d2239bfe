"""Laws of moved experts: each rank knows from the layout who has what, and each element arrives once at all that want it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from virtual_experts import VirtualExperts

from sdit.distributed import reshard as reshard_module
from sdit.expert_parallel.migration import ReplicaRanges, migrate
from sdit.topology import ExpertGroups


class Exchanges:
    """All-to-alls of ranks that run one after another, in two rounds: in the first all send, in the second all receive."""

    def __init__(self) -> None:
        self.rank, self._count = 0, 0
        self._sent: dict[tuple[int, int], list[Tensor]] = {}

    def begin(self, rank: int) -> None:
        self.rank, self._count = rank, 0

    def exchange(self, received: Tensor, sent: Tensor, receive_splits: list[int], send_splits: list[int]) -> None:
        key, self._count = (self.rank, self._count), self._count + 1
        if key not in self._sent:
            self._sent[key] = [chunk.clone() for chunk in sent.split(send_splits)]
            return
        chunks = [self._sent[rank, key[1]][self.rank] for rank in range(len(send_splits))]
        assert [len(chunk) for chunk in chunks] == receive_splits
        received.copy_(torch.cat(chunks))


def value_of(kind: int, block: int, parameter: str, expert: int, elements: Tensor) -> Tensor:
    """Return a number for each element that no other element has."""
    return ((kind * 8 + block) * 2 + (parameter == "bias")) * 1000.0 + expert * 40 + elements


def elements_of(state: VirtualExperts, side: str) -> list[tuple[int, int, str, int, Tensor, Tensor]]:
    """Return kind, block, parameter, expert, the elements of the expert and the values of each range of a rank."""
    found = []
    for kind, each in enumerate(state.expert_state()):
        for part in getattr(each, side).logical_ranges(state.expert_ids):
            stack, _, expert = part.name.rpartition("#")
            block, name = stack.split(".")[1:]
            found.append((kind, int(block), name, int(expert), torch.arange(part.start, part.end), part.values))
    return found


def random_experts(seed: int, blocks: int, count: int, ranks: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([np.sort(rng.permutation(count).reshape(ranks, -1), axis=1) for _ in range(blocks)])


@pytest.mark.parametrize("is_sharded", [True, False], ids=["ZeRO 1", "ZeRO 0"])
@pytest.mark.parametrize(("world", "ranks"), [(2, 2), (4, 2), (12, 4), (24, 8), (64, 8)])
def test_moved_experts_arrive_without_a_question_to_any_rank(
    world: int, ranks: int, is_sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, exchanges = ExpertGroups(world, ranks), Exchanges()
    monkeypatch.setattr(reshard_module.dist, "all_to_all_single", exchanges.exchange)
    before, after = (random_experts(seed, 2, 16, ranks) for seed in (0, 1))
    for is_last in (False, True):
        for rank in range(world):
            state = VirtualExperts(rank, groups, before, is_sharded)
            for *key, elements, values in elements_of(state, "source"):
                values.copy_(value_of(*key, elements))
            exchanges.begin(rank)
            # No method of a process group: whoever asks another rank fails here.
            comm: Any = SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"))
            migrate(comm, state, lambda state=state: setattr(state, "experts", after))  # type: ignore[misc]
            assert state.is_synced
            for *key, elements, values in elements_of(state, "target") if is_last else []:
                assert torch.equal(values, value_of(*key, elements)), (rank, key)


def test_ranges_of_replicas_are_cut_to_what_was_asked() -> None:
    ranges = ReplicaRanges([[("w", 0, 10), ("b", 0, 4)], [("w", 10, 25)], [("w", 25, 30)]])
    assert list(ranges.find("w", 8, 26)) == [(0, 8, 10), (1, 10, 25), (2, 25, 26)]
    assert list(ranges.find("w", 12, 13)) == [(1, 12, 13)]
    assert list(ranges.find("b", 0, 4)) == [(0, 0, 4)]
