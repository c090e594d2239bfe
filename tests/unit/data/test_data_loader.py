"""Laws of the loader: what a run index yields depends on (seed, index, data), and on nothing else."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdit.config import DataConfig, ModelConfig
from sdit.contracts import RawBatch
from sdit.data.bad_samples import BadSample
from sdit.data.dataset import dataset_facts
from sdit.data.encoders import png_encoder
from sdit.data.loader import build_loader
from sdit.data.order import rank_indices
from sdit.data.prepare import prepare
from sdit.data.sources import digits_source
from sdit.errors import DataError

DIGITS_MODEL = ModelConfig(input_size=8, patch_size=2, channels=1, classes=10)


@pytest.fixture
def folder(tmp_path: Path, pictures: SimpleNamespace) -> Path:
    """Forty pictures in shards of 10, 7, 13 and 10."""
    written: Path = pictures.write_folder(tmp_path / "set", [10, 7, 13, 10])
    return written


def requests(first: int, last: int, batch: int) -> Any:
    return iter(np.split(np.arange(first, last), range(batch, last - first, batch)))


def joined(batches: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    held: list[RawBatch] = list(batches)
    return tuple(np.concatenate([getattr(batch, name) for batch in held]) for name in ("index", "x0", "y"))  # type: ignore[return-value]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)


def test_samples_are_the_stored_ones_with_their_labels(open_loader: Any, folder: Path, pictures: Any) -> None:
    batch = open_loader(folder).read(np.arange(40))
    numbers, mirrored = pictures.read_numbers(batch.x0)
    assert sorted(numbers) == list(range(40)) and not any(mirrored)
    assert batch.y.tolist() == [number % 10 for number in numbers]
    assert batch.x0.dtype == np.float32 and batch.y.dtype == batch.index.dtype == np.int64
    assert batch.x0.min() == -1 and batch.x0.max() == 1


@pytest.mark.parametrize("kind", ["images", "latents"])
@pytest.mark.parametrize(("ranks", "micro_steps", "workers", "prefetch"), [(1, 1, 3, 4), (2, 1, 1, 1), (4, 2, 2, 3)])
def test_no_layout_changes_a_bit(
    tmp_path: Path,
    pictures: Any,
    open_loader: Any,
    kind: str,
    ranks: int,
    micro_steps: int,
    workers: int,
    prefetch: int,
) -> None:
    folder = pictures.write_folder(tmp_path / "any", [10, 7, 13, 10], kind=kind, mirrored=True)
    channels = 2 if kind == "latents" else 1
    expected = open_loader(folder, channels=channels, flip=True, streams=3).read(np.arange(96))
    x0, y = np.full_like(expected.x0, np.nan), np.full_like(expected.y, -1)
    for rank in range(ranks):
        asked = [
            rank_indices(first, 16, rank, ranks, step, micro_steps)
            for first in range(0, 96, 16)
            for step in range(micro_steps)
        ]
        loader = open_loader(
            folder, 0, ranks, channels, flip=True, streams=3, workers=workers, prefetch_batches=prefetch
        )
        index, values, labels = joined(loader.prefetch(iter(asked), loader.read))
        assert np.array_equal(index, np.concatenate(asked))
        x0[index], y[index] = values, labels
    assert np.array_equal(x0, expected.x0) and np.array_equal(y, expected.y)


def test_half_of_the_images_are_mirrored_anew_in_each_epoch(open_loader: Any, folder: Path, pictures: Any) -> None:
    epochs = 50
    numbers, mirrored = pictures.read_numbers(open_loader(folder, flip=True).read(np.arange(40 * epochs)).x0)
    assert Counter(numbers) == dict.fromkeys(range(40), epochs)
    assert abs(np.mean(mirrored) - 0.5) < 5 * 0.5 / np.sqrt(40 * epochs)
    flips_of_one = [flip for number, flip in zip(numbers, mirrored, strict=True) if number == 7]
    assert 0 < sum(flips_of_one) < epochs


def test_latents_are_scaled_draws_of_their_posterior(tmp_path: Path, pictures: Any, open_loader: Any) -> None:
    folder = pictures.write_folder(tmp_path / "latents", [20, 20], kind="latents")
    batch = open_loader(folder, channels=2, latent_scale=0.5).read(np.arange(400))
    shards = pictures.write_folder(tmp_path / "images", [20, 20])
    numbers, _ = pictures.read_numbers(open_loader(shards).read(np.arange(400)).x0)  # the same order
    eps = (batch.x0 / 0.5 - np.array(numbers)[:, None, None, None]) / 2  # standard deviation 2
    assert batch.x0.dtype == np.float32
    assert abs(eps.mean()) < 5 / np.sqrt(eps.size) and abs(eps.var() - 1) < 5 * np.sqrt(2 / eps.size)
    assert len(np.unique(eps[:, 0, 0, 0])) == 400  # each reading of a sample draws anew


def test_mirrored_latents_are_those_of_the_mirrored_image(tmp_path: Path, pictures: Any, open_loader: Any) -> None:
    folder = pictures.write_folder(tmp_path / "latents", [20], kind="latents", mirrored=True, first_number=100)
    means = open_loader(folder, channels=2, flip=True).read(np.arange(200)).x0.mean((1, 2, 3))
    assert abs(np.mean(means < 0) - 0.5) < 5 * 0.5 / np.sqrt(200)
    assert (open_loader(folder, channels=2).read(np.arange(200)).x0.mean((1, 2, 3)) > 0).all()


def test_digits_in_memory_equal_prepared_digits(tmp_path: Path, open_loader: Any) -> None:
    prepare(digits_source(), png_encoder(), tmp_path / "digits", samples_per_shard=256)
    stored = DataConfig(source="shards", path=str(tmp_path / "digits"), flip=True)
    with (
        build_loader(DataConfig(flip=True), DIGITS_MODEL, seed=1) as in_memory,
        build_loader(stored, DIGITS_MODEL, seed=1) as from_shards,
    ):
        first, second = in_memory.read(np.arange(1797)), from_shards.read(np.arange(1797))
    assert np.array_equal(first.x0, second.x0) and np.array_equal(first.y, second.y)
    assert Counter(first.y.tolist()) == {0: 178, 1: 182, 2: 177, 3: 183, 4: 181, 5: 182, 6: 181, 7: 179, 8: 174, 9: 180}


def test_an_unconditional_model_gets_zero_labels() -> None:
    model = ModelConfig(input_size=8, patch_size=2, channels=1, classes=0)
    with build_loader(DataConfig(), model, seed=0) as loader:
        assert not loader.read(np.arange(64)).y.any()


@pytest.mark.parametrize(("ranks", "per_rank"), [(1, 4), (2, 2), (4, 1)])
def test_resume_reads_one_shard_per_stream(
    tmp_path: Path, pictures: Any, open_loader: Any, ranks: int, per_rank: int
) -> None:
    folder = pictures.write_folder(tmp_path / "many", [12] * 20)
    for rank in range(ranks):
        loader = open_loader(folder, 0, ranks, streams=4)
        loader.read(rank_indices(4 * 240 + 52, 16, rank, ranks))  # in the fifth epoch, one sample into a shard
        assert loader.shards.opens == per_rank


@pytest.mark.parametrize("workers", [1, 4])
def test_an_epoch_reads_each_shard_once_but_for_those_cut_between_streams(
    tmp_path: Path, pictures: Any, open_loader: Any, workers: int
) -> None:
    shards, streams = 20, 4
    folder = pictures.write_folder(tmp_path / "many", [11, 12, 13, 14] * 5)
    loader = open_loader(folder, streams=streams, workers=workers)
    joined(loader.prefetch(requests(0, loader.facts.total, 8), loader.read))
    assert shards <= loader.shards.opens <= shards + streams - 1


def test_an_open_shard_may_be_deleted(open_loader: Any, folder: Path, pictures: Any) -> None:
    loader = open_loader(folder)
    loader.read(np.arange(40))
    for path in folder.glob("*.tar"):
        path.unlink()
    assert sorted(pictures.read_numbers(loader.read(np.arange(40)).x0)[0]) == list(range(40))
    assert not loader.bad_samples.by_reason


def test_bad_data_stop_the_run_at_once_by_default(open_loader: Any, folder: Path) -> None:
    damage(folder / "shard-000001.tar")
    with pytest.raises(DataError, match=r"shard-000001\.tar: .*sha256.* data\.max_bad_fraction 0 allows 0"):
        open_loader(folder).read(np.arange(40))


def test_bad_samples_are_counted_once_an_epoch_and_replaced_alike_on_all_ranks(
    open_loader: Any, folder: Path, pictures: Any, caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder / "shard-000001.tar")
    with caplog.at_level(logging.WARNING):
        whole = open_loader(folder, max_bad_fraction=0.5)
        expected = whole.read(np.arange(120))
    assert whole.bad_samples.by_reason == {"checksum": 3 * 7}
    assert len(caplog.messages) == 1 and "shard-000001.tar" in caplog.messages[0]
    numbers, _ = pictures.read_numbers(expected.x0)
    good = [number for number in range(40) if not 10 <= number < 17]
    counts = Counter(numbers)
    assert set(counts) == set(good) and sum(counts.values()) == 120
    assert expected.y.tolist() == [number % 10 for number in numbers]
    found: Counter[str] = Counter()
    for rank in range(4):
        loader = open_loader(folder, 0, 4, max_bad_fraction=0.9, workers=2)
        index, x0, _ = joined(
            loader.prefetch(iter([rank_indices(first, 24, rank, 4) for first in range(0, 120, 24)]), loader.read)
        )
        assert np.array_equal(x0, expected.x0[index])
        found += loader.bad_samples.by_reason
    assert found == whole.bad_samples.by_reason


def test_a_bad_sample_is_replaced_by_the_next_one_of_its_shard(
    tmp_path: Path, pictures: Any, open_loader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pictures.write_folder(tmp_path / "one", [9])
    order = pictures.read_numbers(open_loader(folder, streams=1).read(np.arange(9)).x0)[0]
    bad = {order[3], order[4]}

    def label(data: bytes, facts: Any, shard: str, key: str) -> int:
        if int(key) in bad:
            raise BadSample("bad_label", shard, key, "has a bad label")
        return int(data)

    monkeypatch.setattr("sdit.data.decode._decode_label", label)
    loader = open_loader(folder, streams=1, max_bad_fraction=0.5)
    numbers = pictures.read_numbers(loader.read(np.arange(9)).x0)[0]
    assert numbers == order[:3] + [order[5]] * 3 + order[6:]
    assert loader.bad_samples.by_reason == {"bad_label": 2}
    with pytest.raises(DataError, match=rf"shard-000000\.tar: sample {order[4]:09d}: .*bad_label.* allows 1"):
        open_loader(folder, streams=1, max_bad_fraction=0.2).read(np.arange(9))


def test_the_allowed_fraction_is_of_each_epoch(open_loader: Any, folder: Path) -> None:
    damage(folder / "shard-000001.tar")
    loader = open_loader(folder, max_bad_fraction=7 / 40)
    loader.read(np.arange(400))
    with pytest.raises(DataError, match="7 bad samples in epoch"):
        open_loader(folder, max_bad_fraction=6.9 / 40).read(np.arange(400))


def test_one_rank_may_meet_all_that_the_run_is_allowed(open_loader: Any, folder: Path) -> None:
    damage(folder / "shard-000001.tar")
    bad = 7  # of 40, and all of them may fall to one rank
    loader = open_loader(folder, ranks=2, max_bad_fraction=bad / 40)
    loader.read(np.arange(40))
    assert loader.bad_samples.in_latest_epoch == bad == round(loader.bad_samples.allowed)
    with pytest.raises(DataError, match="7 bad samples"):
        open_loader(folder, ranks=2, max_bad_fraction=0.9 * bad / 40).read(np.arange(40))


def test_data_that_are_all_bad_end_in_an_error(open_loader: Any, folder: Path) -> None:
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match="no sample of the whole data set"):
        open_loader(folder, max_bad_fraction=1.0).read(np.arange(4))


@pytest.mark.parametrize("workers", [1, 3])
def test_errors_of_the_decoding_threads_reach_the_consumer_in_their_place(
    open_loader: Any, folder: Path, workers: int
) -> None:
    (folder / "shard-000002.tar").unlink()
    loader = open_loader(folder, streams=1, workers=workers, prefetch_batches=3)
    read = []
    with pytest.raises(DataError, match=r"shard-000002\.tar"):
        for batch in loader.prefetch(requests(0, 40, 2), loader.read):
            read.append(batch)
    one_by_one = open_loader(folder, streams=1)
    for batch in read:
        assert np.array_equal(batch.x0, one_by_one.read(batch.index).x0)
    with pytest.raises(DataError):
        one_by_one.read(np.arange(2 * len(read), 2 * len(read) + 2))


def test_decoding_runs_ahead_of_use_as_far_as_configured(open_loader: Any, folder: Path) -> None:
    taken = []

    def asked() -> Any:
        for batch in requests(0, 40, 4):
            taken.append(batch)
            yield batch

    loader = open_loader(folder, prefetch_batches=3)
    batches = loader.prefetch(asked(), loader.read)
    assert taken == []
    for used in range(1, 8):
        next(batches)
        assert len(taken) == used + 3


def test_closing_ends_all_threads_even_with_batches_under_way(folder: Path) -> None:
    before = threading.active_count()
    config = DataConfig(source="shards", path=str(folder), workers=4, prefetch_batches=4)
    with build_loader(config, ModelConfig(input_size=4, channels=1, classes=10), seed=0) as loader:
        batches = loader.prefetch(requests(0, 4000, 8), loader.read)
        next(batches)
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_threads_that_want_one_shard_share_one_reading(open_loader: Any, folder: Path) -> None:
    loader = open_loader(folder, workers=4)
    joined(loader.prefetch(requests(0, 40, 40), loader.read))
    assert loader.shards.opens == 4


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({"input_size": 8}, {}, r"model\.input_size: 8, but data\.path .* holds images of size 4"),
        ({"channels": 3}, {}, r"model\.channels: 3, but .* holds images of 1 channels"),
        ({"classes": 9}, {}, r"model\.classes: 9, but .* holds 10 classes"),
    ],
)
def test_data_that_do_not_fit_the_model_are_refused(
    folder: Path, model: dict[str, Any], data: dict[str, Any], message: str
) -> None:
    wanted = ModelConfig(**{"input_size": 4, "channels": 1, "classes": 10, **model})
    with pytest.raises(DataError, match=message):
        build_loader(DataConfig(source="shards", path=str(folder), **data), wanted, seed=0)


def test_flip_needs_latents_of_mirrored_images(tmp_path: Path, pictures: Any, open_loader: Any) -> None:
    folder = pictures.write_folder(tmp_path / "latents", [3], kind="latents")
    with pytest.raises(DataError, match=r"data\.flip: True, .* prepare them with --flip"):
        open_loader(folder, channels=2, flip=True)


def test_facts_are_known_without_reading_a_shard(folder: Path) -> None:
    for path in folder.glob("*.tar"):
        path.unlink()
    facts = dataset_facts(DataConfig(source="shards", path=str(folder)))
    assert (facts.kind, facts.total, facts.classes, facts.channels, facts.size) == ("images", 40, 10, 1, 4)
    assert dataset_facts(DataConfig()).total == 1797


def test_a_missing_folder_is_answered_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none/index\.json: no such file; run: sdit prepare <source> --out "):
        dataset_facts(DataConfig(source="shards", path=str(tmp_path / "none")))


def test_a_half_prepared_folder_says_so(folder: Path) -> None:
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match="its preparation did not finish"):
        dataset_facts(DataConfig(source="shards", path=str(folder)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 1', '"version": 2', "version"),
        ('"total": 40', '"total": 41', "facts.total: 41, but the shards hold 40 samples"),
        ('"total": 40', '"total": "40"', "facts.total"),
        ('"shard-000001.tar"', '"../shard-000001.tar"', "shards.1.name"),
        ('"shard-000001.tar"', '"shard-000000.tar"', "a name occurs twice"),
        ('"recipe"', '"receipt"', "recipe"),
        ('"channels": 1', '"channels": 2', "legal for images: 1"),
        ("{", "", "JSON"),
    ],
)
def test_an_index_that_cannot_be_trusted_is_refused_in_one_line(folder: Path, old: str, new: str, message: str) -> None:
    index = folder / "index.json"
    index.write_text(index.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=message) as caught:
        dataset_facts(DataConfig(source="shards", path=str(folder)))
    assert str(caught.value).startswith(str(index)) and "\n" not in str(caught.value)
