"""Laws of latents that are decoded when their shard is opened: they equal latents that are decoded one by one."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdit import randomness
from sdit.data.bad_samples import BadSample
from sdit.data.decode import Sample, decode_sample, encode_moments
from sdit.data.index import DatasetFacts, DatasetIndex, ShardRecord, write_index
from sdit.data.order import SampleOrder
from sdit.data.shards import read_shard, write_shard
from sdit.randomness import Purpose

SIZE, CHANNELS = 4, 2
GOOD = {"cls": b"7"}
RNG = np.random.default_rng(0)


def npy(dtype: str = "<f4", orientations: int = 2) -> bytes:
    return encode_moments(RNG.standard_normal((orientations, 2 * CHANNELS, SIZE, SIZE)).astype(dtype))


def non_finite() -> bytes:
    values = np.zeros((2, 2 * CHANNELS, SIZE, SIZE), np.float32)
    values[1, 3, 2, 1] = np.nan
    return encode_moments(values)


CASES: dict[str, dict[str, bytes]] = {
    "float32": {"cls": b"1", "npy": npy()},
    "float16": {"cls": b"2", "npy": npy("<f2")},
    "metadata": {"cls": b"3", "json": b"{}", "npy": npy(), "txt": b"seen"},
    "blank after the label": {"cls": b"4\n", "npy": npy()},
    "nine digits": {"cls": b"000000005", "npy": npy()},
    "ten digits": {"cls": b"0000000005", "npy": npy()},
    "no label": {"npy": npy()},
    "empty label": {"cls": b"", "npy": npy()},
    "label too large": {"cls": b"10", "npy": npy()},
    "label in another script": {"cls": "٣".encode(), "npy": npy()},
    "no latents": {"cls": b"1"},
    "cut off": {"cls": b"1", "npy": npy()[:-4]},
    "too long": {"cls": b"1", "npy": npy() + b"\0"},
    "one orientation": {"cls": b"1", "npy": npy(orientations=1)},
    "big-endian": {"cls": b"1", "npy": npy(">f4")},
    "not npy": {"cls": b"1", "npy": b"x" * len(npy())},
    "not finite": {"cls": b"1", "npy": non_finite()},
}


def facts(total: int) -> DatasetFacts:
    return DatasetFacts(kind="latents", total=total, channels=CHANNELS, size=SIZE, classes=10, mirrored=True)


def write_latents(folder: Path, shards: list[list[dict[str, bytes]]]) -> DatasetIndex:
    folder.mkdir()
    records, number = [], 0
    for shard, samples in enumerate(shards):
        keyed = [(f"{number + i:09d}", encoded) for i, encoded in enumerate(samples)]
        record = write_shard(folder / f"shard-{shard:06d}.tar", keyed)
        assert record is not None
        records.append(record)
        number += len(samples)
    index = DatasetIndex(facts=facts(number), recipe={}, shards=tuple(records))
    write_index(folder, index)
    return index


def plain_samples(folder: Path, record: ShardRecord, about: DatasetFacts) -> list[Sample | str]:
    """Each sample of a shard, read with tarfile and decoded one at a time, or the text of its error."""
    encoded: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=io.BytesIO((folder / record.name).read_bytes())) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None
            encoded.setdefault(key, {})[suffix] = file.read()
    found: list[Sample | str] = []
    for key, members in encoded.items():
        try:
            found.append(decode_sample(members, about, record.name, key))
        except BadSample as fault:
            found.append(str(fault))
    return found


@pytest.mark.parametrize("first", CASES)
def test_a_shard_gives_the_samples_and_the_errors_of_plain_decoding(tmp_path: Path, first: str) -> None:
    """The form of the first usable sample is the usual form of a shard. Each case comes first once."""
    samples = [CASES[first], *CASES.values(), *CASES.values()]
    index = write_latents(tmp_path / "set", [samples])
    shard = read_shard(tmp_path / "set", index.shards[0], index.facts)
    expected = plain_samples(tmp_path / "set", index.shards[0], index.facts)
    assert len(shard) == len(expected) == len(samples)
    for member, plain in enumerate(expected):
        if isinstance(plain, str):
            with pytest.raises(BadSample) as caught:
                shard.sample(member)
            assert str(caught.value) == plain
        else:
            sample = shard.sample(member)
            assert sample.label == plain.label and sample.values.dtype == plain.values.dtype
            assert sample.values.tobytes() == plain.values.tobytes()
    assert shard.decoded is not None
    bad = [isinstance(plain, str) for plain in expected]
    assert (shard.decoded.row >= 0).any() and not (shard.decoded.row[bad] >= 0).any()


def test_a_good_shard_is_decoded_whole_and_its_archive_is_dropped(tmp_path: Path) -> None:
    index = write_latents(tmp_path / "set", [[{**GOOD, "npy": npy()} for _ in range(9)]])
    shard = read_shard(tmp_path / "set", index.shards[0], index.facts)
    assert shard.decoded is not None and sorted(shard.decoded.row.tolist()) == list(range(9))
    assert shard.decoded.values.shape == (9, 2, 2 * CHANNELS, SIZE, SIZE) and shard.decoded.labels.tolist() == [7] * 9
    assert len(shard._data) == 0


def test_a_shard_of_bad_samples_only_decodes_nothing(tmp_path: Path) -> None:
    index = write_latents(tmp_path / "set", [[CASES["no label"], CASES["not npy"], CASES["no latents"]]])
    shard = read_shard(tmp_path / "set", index.shards[0], index.facts)
    assert shard.decoded is not None and shard.decoded.row.tolist() == [-1, -1, -1]


def test_a_large_claim_of_one_sample_takes_no_memory_for_the_others(tmp_path: Path) -> None:
    """Rows are allocated for samples of the usual length only."""
    index = write_latents(tmp_path / "set", [[CASES["float32"], *[CASES["no latents"]] * 50]])
    shard = read_shard(tmp_path / "set", index.shards[0], index.facts)
    assert shard.decoded is not None and len(shard.decoded.values) == 1


def test_batches_are_those_of_samples_read_one_by_one(tmp_path: Path, open_loader: Any) -> None:
    """The loader's arithmetic in its plain form: one posterior draw per sample."""
    good = ["float32", "float16", "metadata", "nine digits"]
    shards = [[CASES[name] for name in good] * count for count in (3, 2, 4)]
    index = write_latents(tmp_path / "set", shards)
    plain = [plain_samples(tmp_path / "set", record, index.facts) for record in index.shards]
    batch = open_loader(tmp_path / "set", seed=5, channels=CHANNELS, flip=True, streams=4, latent_scale=0.5).read(
        np.arange(100)
    )
    keys = SampleOrder([len(samples) for samples in shards], 4, 5).locate(np.arange(100))
    for row, key in enumerate(keys):
        sample = plain[key.shard][key.member]
        assert isinstance(sample, Sample)
        words = (np.array([word]) for word in (key.epoch, key.shard, key.member))
        epoch, shard, member = words
        mirrored = int(randomness.coins(randomness.keys(5, Purpose.FLIP, epoch, shard, member))[0])
        eps = randomness.normals(randomness.keys(5, Purpose.POSTERIOR, epoch, shard, member), CHANNELS * SIZE * SIZE)
        mean, log_variance = np.split(sample.values[mirrored].astype(np.float32), 2)
        expected = (mean + np.exp(log_variance / 2) * eps.reshape(mean.shape)) * np.float32(0.5)
        assert batch.x0[row].tobytes() == expected.tobytes() and batch.y[row] == sample.label
