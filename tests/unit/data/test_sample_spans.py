"""Laws of the samples of an archive in arrays: they are those of webdataset, or the archive is left to it."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest

from sdit.data.shards import _plain_samples, _samples
from sdit.data.tar_headers import SampleSpans


def archive(*names: str) -> bytes:
    """A tar file with a member of another size for each name."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = 300 * number
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return stream.getvalue()


def listed(samples: SampleSpans) -> list[tuple[str, dict[str, slice]]]:
    return [(key, samples.spans(number)) for number, key in enumerate(samples.keys)]


PLAIN = {
    "two members each": ["00.npy", "00.cls", "01.npy", "01.cls"],
    "one sample": ["x.png"],
    "uneven": ["a.txt", "a.jpeg", "a.json", "b.cls", "c.webp", "c.cls"],
    "a long key": ["k" * 96 + ".npy", "k" * 96 + ".cls"],
    "keys that begin alike": ["1.npy", "10.npy", "100.npy", "1000.npy"],
}
LEFT = {
    "no suffix": ["00", "00.cls"],
    "no key": [".npy"],
    "a folder": ["a/00.npy"],
    "another suffix": ["00.pyd"],
    "a longer suffix": ["00.jpegs"],
    "a shorter suffix": ["00.np"],
    "two suffixes": ["00.cls.npy"],
    "upper case": ["00.NPY"],
    "a suffix twice": ["00.npy", "00.cls", "00.npy"],
}


@pytest.mark.parametrize("names", PLAIN.values(), ids=PLAIN.keys())
def test_plain_samples_are_those_of_webdataset(names: list[str]) -> None:
    data = archive(*names)
    found = _plain_samples(data)
    assert found is not None and len(found) == len(set(name.partition(".")[0] for name in names))
    other = SampleSpans.of(_samples("shard", data))
    assert listed(found) == listed(other) == list(_samples("shard", data))
    for suffix in ("npy", "cls", "png", "jpeg"):
        starts, sizes = found.column(suffix)
        assert all(np.array_equal(*pair) for pair in zip((starts, sizes), other.column(suffix), strict=True))
        for (_, spans), start, size in zip(listed(found), starts, sizes, strict=True):
            assert (spans[suffix] == slice(start, start + size)) if suffix in spans else (start, size) == (0, -1)


@pytest.mark.parametrize("names", LEFT.values(), ids=LEFT.keys())
def test_other_names_are_left_to_webdataset(names: list[str]) -> None:
    assert _plain_samples(archive(*names)) is None


def test_an_archive_without_samples_has_empty_columns() -> None:
    empty = SampleSpans.of([])
    assert len(empty) == 0 and all(len(column) == 0 for column in empty.column("npy"))
