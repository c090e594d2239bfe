"""Laws of the sample order."""

import numpy as np
import pytest

from sdit.contracts import SampleKey
from sdit.data.order import SampleOrder, rank_indices
from sdit.errors import ConfigError

SHAPES = [
    ([5], 1),
    ([1], 8),
    ([7], 3),
    ([4, 4, 4, 4], 4),
    ([4, 4, 4, 4], 8),
    ([9, 1, 5, 2, 30], 2),
    ([1, 1, 1, 1, 1, 1, 1], 3),
    ([100, 3], 7),
    ([16] * 10 + [5], 8),
]


def keys_of(order: SampleOrder, first: int, count: int) -> list[SampleKey]:
    return list(order.locate(np.arange(first, first + count)))


@pytest.mark.parametrize(("counts", "streams"), SHAPES)
def test_each_image_once_per_epoch(counts: list[int], streams: int) -> None:
    order = SampleOrder(counts, streams, seed=3)
    total = sum(counts)
    assert order.samples_per_epoch == total
    for epoch in range(3):
        expected = {SampleKey(epoch, s, m) for s, count in enumerate(counts) for m in range(count)}
        keys = keys_of(order, epoch * total, total)
        assert len(keys) == total and set(keys) == expected


@pytest.mark.parametrize(("counts", "streams"), SHAPES)
def test_order_does_not_depend_on_the_batch_it_is_asked_in(counts: list[int], streams: int) -> None:
    total = sum(counts)
    whole = keys_of(SampleOrder(counts, streams, 0), 0, 3 * total)
    order = SampleOrder(counts, streams, 0)
    for index in np.random.default_rng(0).permutation(3 * total):
        assert keys_of(order, int(index), 1) == [whole[index]]


def test_a_batch_may_straddle_epochs() -> None:
    keys = keys_of(SampleOrder([3, 4], 2, 0), 5, 4)
    assert [key.epoch for key in keys] == [0, 0, 1, 1]


def test_seeds_and_epochs_have_their_own_orders() -> None:
    counts = [50, 50, 50, 50]
    orders = [keys_of(SampleOrder(counts, 2, seed), epoch * 200, 200) for seed in range(3) for epoch in range(3)]
    assert len({tuple((key.shard, key.member) for key in order) for order in orders}) == 9


def test_every_sample_may_come_first() -> None:
    counts, tries = [2, 3, 5], 4000
    first = [keys_of(SampleOrder(counts, 2, seed), 0, 1)[0] for seed in range(tries)]
    for shard, count in enumerate(counts):
        # A shard comes first with probability 1/3, then each of its members alike.
        for member in range(count):
            p = 1 / 3 / count
            seen = sum((key.shard, key.member) == (shard, member) for key in first)
            assert abs(seen - tries * p) < 5 * np.sqrt(tries * p * (1 - p))


@pytest.mark.parametrize(("shards", "streams"), [(8, 8), (12, 4), (16, 5)])
def test_neighbouring_samples_come_from_distinct_shards(shards: int, streams: int) -> None:
    order = SampleOrder([20] * shards, streams, 1)
    keys = keys_of(order, 0, 20 * shards)
    for start in range(len(keys) - streams):
        assert (
            len({key.shard for key in keys[start : start + streams]}) >= streams - 1
        )  # one stream may go on to the next
    assert len({key.shard for key in keys[:streams]}) == streams


def test_each_shard_is_shuffled_anew_in_each_epoch() -> None:
    keys = keys_of(SampleOrder([40, 40], 1, 0), 0, 240)
    orders = {tuple(key.member for key in keys if (key.epoch, key.shard) == each) for each in np.ndindex(3, 2)}
    assert len(orders) == 6


@pytest.mark.parametrize(("ranks", "micro_steps"), [(1, 1), (2, 1), (4, 3), (8, 1), (3, 2)])
def test_union_over_ranks_is_the_single_reader(ranks: int, micro_steps: int) -> None:
    batch = 48
    for first in (0, 48, 53):
        for step in range(micro_steps):
            size = batch // micro_steps
            parts = [rank_indices(first, batch, rank, ranks, step, micro_steps) for rank in range(ranks)]
            assert {len(part) for part in parts} == {size // ranks}
            assert sorted(np.concatenate(parts)) == list(range(first + step * size, first + (step + 1) * size))
            assert all((part % ranks == rank).all() for rank, part in enumerate(parts))


def test_a_strided_rank_touches_its_share_of_the_streams() -> None:
    streams, ranks = 8, 4
    order = SampleOrder([64] * streams, streams, 0)  # every stream is one shard
    for rank in range(ranks):
        indices = np.concatenate([rank_indices(first, 64, rank, ranks) for first in range(0, 512, 64)])
        assert len(np.unique(order.locate(indices).shard)) == streams // ranks


def test_an_uneven_global_batch_is_refused_with_the_legal_ones() -> None:
    with pytest.raises(ConfigError, match=r"train.global_batch: 10 .* legal: multiples of 8"):
        rank_indices(0, 10, 0, ranks=4, micro_steps=2)


def test_substitutes_are_the_rest_of_the_shard_and_follow_its_order() -> None:
    order = SampleOrder([6, 4], 1, 0)
    in_shard = [key for key in keys_of(order, 0, 10) if key.shard == 0]
    key = in_shard[2]
    assert list(order.substitutes(key)) == in_shard[3:] + in_shard[:2]


def test_neighbours_are_one_sample_of_each_other_shard() -> None:
    order = SampleOrder([6, 1, 4], 1, 0)
    found = list(order.neighbours(SampleKey(5, 1, 0)))
    assert [(key.epoch, key.shard) for key in found] == [(5, 2), (5, 0)]
    assert [key.shard for key in order.neighbours(SampleKey(0, 0, 5))] == [1, 2]
    assert all(key.member < [6, 1, 4][key.shard] for key in order.neighbours(SampleKey(0, 0, 5)))
