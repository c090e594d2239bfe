"""Laws of the fast reading of tar headers: it finds what tarfile finds, or leaves the archive to tarfile."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from sdit.data import tar_headers
from sdit.data.tar_headers import BLOCK


class Member(NamedTuple):
    name: str
    span: slice


def plain_members(data: bytes) -> list[Member] | None:
    """The members that array operations find, None for an archive that they leave to tarfile."""
    found = tar_headers.plain_members(data)
    if found is None:
        return None
    names = [bytes(name).rstrip(b"\0").decode() for name in found.names]
    spans = [slice(start, stop) for start, stop in zip(found.starts.tolist(), found.stops.tolist(), strict=True)]
    return [Member(*each) for each in zip(names, spans, strict=True)]


def archive(*names: str, size: int = 700, form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar file with a member of `size` bytes for each name."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(bytes(range(256)) * 4))
    return stream.getvalue()


def found_by_tarfile(data: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return [Member(each.name, slice(each.offset_data, each.offset_data + each.size)) for each in tar]


def with_field(data: bytes, at: int, value: bytes) -> bytes:
    """The archive with other bytes in its first header, and a checksum that fits."""
    header = bytearray(data[:BLOCK])
    header[at : at + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[BLOCK:]


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513])
def test_plain_archives_have_the_members_that_tarfile_finds(size: int) -> None:
    data = archive("000.cls", "000.npy", "a/b.json", "1-_.txt", size=size)
    members = plain_members(data)
    assert members is not None and len(members) == 4 and members == found_by_tarfile(data)


NOT_PLAIN: dict[str, Callable[[bytes], bytes]] = {
    "a link": lambda data: with_field(data, 156, b"2"),
    "an old header's type": lambda data: with_field(data, 156, b"\0"),
    "GNU magic": lambda data: with_field(data, 257, b"ustar  \0"),
    "a prefix": lambda data: with_field(data, 345, b"folder"),
    "a link name": lambda data: with_field(data, 157, b"target"),
    "a size that is not octal": lambda data: with_field(data, 124, b"00000000008"),
    "a negative size": lambda data: with_field(data, 124, b"-0000001000"),
    "a size with a separator": lambda data: with_field(data, 124, b"0000000_001"),
    "a size of twelve digits": lambda data: with_field(data, 135, b"1"),
    "a binary size": lambda data: with_field(data, 124, b"\x80" + bytes(10)),
    "a mode that is no number": lambda data: with_field(data, 100, b"rw"),
    "a time that is no number": lambda data: with_field(data, 136, b"now"),
    "a name with a NUL in it": lambda data: with_field(data, 0, b"0\0x"),
    "a name beyond ASCII": lambda data: with_field(data, 0, b"\xff"),
    "a wrong checksum": lambda data: data[:3] + b"9" + data[4:],
    "no end": lambda data: data[: 3 * BLOCK],
    "an end that is cut off": lambda data: data[: 3 * BLOCK + 100],
    "an end that is not zero": lambda data: data[: 3 * BLOCK] + b"\0" * 100 + b"x" * 412,
    "no member": lambda data: bytes(10 * BLOCK),
    "no bytes": lambda data: b"",
}


@pytest.mark.parametrize("change", NOT_PLAIN.values(), ids=NOT_PLAIN.keys())
def test_other_archives_are_left_to_tarfile(change: Callable[[bytes], bytes]) -> None:
    assert plain_members(archive("000.cls")) is not None
    assert plain_members(change(archive("000.cls"))) is None


def test_a_member_that_looks_like_a_header_is_left_to_tarfile() -> None:
    data = archive("000.cls", "001.cls", size=2 * BLOCK)
    inner = data[: 3 * BLOCK]  # a header with its member
    disguised = data[:BLOCK] + inner[: 2 * BLOCK] + data[3 * BLOCK :]
    assert len(disguised) == len(data) and plain_members(data) is not None and plain_members(disguised) is None
    assert [each.name for each in found_by_tarfile(disguised)] == ["000.cls", "001.cls"]


def test_a_long_name_is_left_to_tarfile() -> None:
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        assert plain_members(archive("x" * 101 + ".cls", form=form)) is None


def test_no_changed_header_is_read_in_another_way_than_tarfile_reads_it() -> None:
    data = archive("000.cls", "000.npy", size=3)
    rng = np.random.default_rng(0)
    accepted = 0
    for _ in range(1500):
        at, value = (
            int(rng.integers(BLOCK - 3)),
            rng.integers(256, size=int(rng.integers(1, 4)), dtype=np.uint8).tobytes(),
        )
        changed = with_field(data, at, value)[: len(data)]
        members = plain_members(changed)
        if members is not None:
            accepted += 1
            assert members == found_by_tarfile(changed), (at, value)
    assert accepted > 100  # some fields, such as the names of owner and group, may have any value
