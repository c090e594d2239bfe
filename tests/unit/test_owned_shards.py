"""Which rank writes which range of state that several ranks have."""

from __future__ import annotations

import pytest
import torch

from sdit.distributed.shards import ReplicaShare, Shard, owned_shards

OPTIMIZER = torch.optim.SGD([torch.zeros(1)])


def parameter(name: str, numel: int) -> Shard:
    return Shard(name, (numel,), 0, numel, torch.arange(numel), 0, OPTIMIZER)


def owned_by_rank(local: list[Shard], count: int) -> list[list[Shard]]:
    return [owned_shards(local, {shard.name: ReplicaShare(rank, count) for shard in local}) for rank in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("sizes", [(1,), (5, 1, 7), (1, 1, 1), (100, 3, 50, 64)])
def test_each_element_is_written_once_in_few_ranges(sizes: tuple[int, ...], count: int) -> None:
    local = [parameter(f"p{number}", size) for number, size in enumerate(sizes)]
    ranks = owned_by_rank(local, count)
    written = [(shard.name, int(element)) for shards in ranks for shard in shards for element in shard.master]
    assert written == [(shard.name, element) for shard in local for element in range(shard.numel)]
    assert all(shard.numel == len(shard.master) > 0 and shard.master[0] == shard.start for s in ranks for shard in s)
    assert sum(map(len, ranks)) < len(sizes) + count
    assert max(sum(shard.numel for shard in shards) for shards in ranks) == -(-sum(sizes) // count)
    assert all(len({shard.name for shard in shards}) == len(shards) for shards in ranks)


def test_experts_are_split_over_their_own_ranks() -> None:
    """Four ranks, EP 2: two ranks have the same experts, all have the dense weights. The kinds may alternate."""
    for group in range(2):
        dense, experts = [parameter("a", 6), parameter("b", 6)], [parameter("e", 4), parameter("f", 2)]
        written = []
        for place in range(2):
            shares = {"a": ReplicaShare(2 * place + group, 4), "e": ReplicaShare(place, 2)}
            shares |= {"b": shares["a"], "f": shares["e"]}
            owned = owned_shards([dense[0], experts[0], dense[1], experts[1]], shares)
            assert sum(shard.numel for shard in owned if shard.name in "ab") == 3
            written += [(shard.name, int(each)) for shard in owned if shard.name in "ef" for each in shard.master]
        assert written == [("e", 0), ("e", 1), ("e", 2), ("e", 3), ("f", 0), ("f", 1)]


def test_a_shard_of_one_rank_is_written_whole() -> None:
    shard = Shard("p", (10,), 4, 3, torch.arange(20), 7, OPTIMIZER)
    (owned,) = owned_shards([shard], {"p": ReplicaShare(0, 1)})
    assert (owned.start, owned.numel, owned.offset) == (4, 3, 7)
