"""The members and the samples of a tar file in memory, found without a Python object for each header.

tarfile holds the interpreter lock while it parses a member. The shards that sdit writes have only plain
POSIX headers, which array operations find and check together. N samples, M members.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sdit.data.decode import ALLOWED_SUFFIXES

BLOCK = 512
_NAME_END = 100
_SIZE, _SIZE_END = 124, 135  # eleven octal digits, then a NUL
_MAGIC, _MAGIC_AT = b"ustar\x0000", 257
_NUMBERS = np.r_[100:124, 136:148, 329:345]  # mode, owner, group, time, device: octal digits and NULs
_HEADER = np.dtype(
    {
        "names": ["name", "size_end", "checksum", "checksum_end", "type", "link", "magic", "prefix"],
        "formats": ["S100", "S1", ("u1", 6), "S2", "S1", "S100", "S8", "S155"],
        "offsets": [0, _SIZE_END, 148, 154, 156, 157, 257, 345],
        "itemsize": BLOCK,
    }
)
Spans = dict[str, slice]  # where the members of a sample are in its archive, by suffix
_SUFFIXES = np.array(sorted(ALLOWED_SUFFIXES))
_LONGEST = max(map(len, ALLOWED_SUFFIXES))


def read_member(descriptor: int, offset: int, size: int) -> tuple[str, bytes]:
    """Return the name and the bytes of a member whose bytes begin at `offset`. The file may end before `size` bytes."""
    block_and_data = os.pread(descriptor, size + BLOCK, offset - BLOCK)
    return block_and_data[:_NAME_END].split(b"\0")[0].decode("utf-8", "backslashreplace"), block_and_data[BLOCK:]


class Members(NamedTuple):
    """The files of a tar archive, in its order: their `names` (M, 100) uint8, filled up with NULs, and where their bytes are.

    The bytes of a member are those from `starts` to `stops`, both (M,) int64.
    """

    names: np.ndarray
    starts: np.ndarray
    stops: np.ndarray


def plain_members(data: bytes) -> Members | None:
    """Return the members of a tar archive, the same as tarfile finds. Return None if a header is not plain.

    A plain header is one that Python's tarfile writes for a regular file with a short ASCII name: POSIX format, octal
    size, unsigned checksum, no prefix and no link. None is also returned if a member holds the magic bytes of a header.
    """
    blocks = np.frombuffer(data, np.uint8, count=len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)
    at = np.flatnonzero(_words(data, len(blocks), _MAGIC_AT) == int.from_bytes(_MAGIC, "little"))
    if not len(at):
        return None
    headers = blocks.take(at, axis=0)
    digits = headers[:, _SIZE:_SIZE_END] - np.uint8(ord("0"))
    sizes = digits @ (8 ** np.arange(_SIZE_END - _SIZE - 1, -1, -1))
    ends = at + 1 - -sizes // BLOCK  # in blocks; where the next header is
    end = BLOCK * int(ends[-1])
    is_chain = at[0] == 0 and (ends[:-1] == at[1:]).all()
    if not is_chain or (digits > 7).any() or data[end : end + BLOCK] != bytes(BLOCK):
        return None
    names = headers[:, :_NAME_END]
    has_gap = ((names[:, 1:] != 0) & (names[:, :-1] == 0)).any()
    if has_gap or (names[:, 0] == 0).any() or (names > 127).any() or not _are_plain(headers):
        return None
    starts = BLOCK * (at + 1)
    return Members(names, starts, starts + sizes)


def _words(data: bytes, blocks: int, at: int) -> np.ndarray:
    """Return the 8 bytes at a position of each block, (blocks,) uint64."""
    return np.ndarray((blocks,), "<u8", data, offset=at, strides=(BLOCK,)) if blocks else np.empty(0, np.uint64)


def _are_plain(headers: np.ndarray) -> bool:
    """Return True if all headers (M, 512) uint8 are plain and have the right checksum."""
    fields = headers.view(_HEADER)[:, 0]
    numbers = headers[:, _NUMBERS]
    digits = fields["checksum"].astype(np.int64) - ord("0")
    stated = digits @ (8 ** np.arange(5, -1, -1))
    # The sum of a header counts the eight bytes of its checksum as blanks.
    computed = headers.sum(axis=1, dtype=np.int64) - headers[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    checks = (
        fields["type"] == b"0", fields["magic"] == _MAGIC, fields["link"] == b"", fields["prefix"] == b"",
        fields["size_end"] == b"", fields["checksum_end"] == b"\0 ",
        ((digits >= 0) & (digits < 8)).all(axis=1), stated == computed,
        ((numbers == 0) | ((numbers >= ord("0")) & (numbers < ord("8")))).all(axis=1),
    )  # fmt: skip
    return all(bool(check.all()) for check in checks)


@dataclass(frozen=True)
class SampleSpans:
    """The samples of an archive: their `keys` (N,), and their members one after another.

    `first` (N + 1,) is the number of members of the samples before. `suffix`, `starts` and `stops` (M,) are those of the members.
    """

    keys: list[str]
    first: np.ndarray
    suffix: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def spans(self, sample: int) -> Spans:
        """Return where the members of a sample are."""
        members = slice(*self.first[sample : sample + 2].tolist())
        columns = (each[members].tolist() for each in (self.suffix, self.starts, self.stops))
        return {suffix: slice(start, stop) for suffix, start, stop in zip(*columns, strict=True)}

    def column(self, suffix: str) -> tuple[np.ndarray, np.ndarray]:
        """Return where the member with a suffix begins in each sample, and its size, (N,) int64 each. Size -1: no such member."""
        member = np.flatnonzero(self.suffix == suffix)
        sample = np.searchsorted(self.first, member, side="right") - 1
        starts, sizes = np.zeros(len(self), dtype=np.int64), np.full(len(self), -1)
        starts[sample], sizes[sample] = self.starts[member], (self.stops - self.starts)[member]
        return starts, sizes

    @classmethod
    def of(cls, samples: Iterable[tuple[str, Spans]]) -> SampleSpans:
        """Return the same of a key and the spans of each sample."""
        listed = list(samples)
        members = [(suffix, span.start, span.stop) for _, spans in listed for suffix, span in spans.items()]
        columns = [np.array(column) for column in zip(*members, strict=True)] or [np.empty(0, np.int64)] * 3
        first = np.cumsum([0, *(len(spans) for _, spans in listed)])
        return cls([key for key, _ in listed], first, *columns)


def group_members(members: Members) -> SampleSpans | None:
    """Return the samples of an archive. The members of a sample follow each other and have its key before the first dot.

    Return None if a name is not KEY.SUFFIX with one of ALLOWED_SUFFIXES, or if a suffix occurs twice in a sample.
    """
    names = np.pad(members.names, ((0, 0), (0, _LONGEST + 2)))
    is_dot = names == ord(".")
    dot = is_dot.argmax(axis=1)  # 0 without a dot
    if (dot == 0).any() or (names == ord("/")).any():
        return None
    tails = np.take_along_axis(names, dot[:, None] + 1 + np.arange(_LONGEST + 1), axis=1)
    tails = np.ascontiguousarray(tails).view(f"S{_LONGEST + 1}")[:, 0]
    kind = np.searchsorted(_SUFFIXES.astype(tails.dtype), tails).clip(max=len(_SUFFIXES) - 1)
    if (_SUFFIXES.astype(tails.dtype)[kind] != tails).any():
        return None
    keys = np.where(np.arange(names.shape[1]) < dot[:, None], names, 0).astype(np.uint8)
    first = np.flatnonzero(np.append(True, (keys[1:] != keys[:-1]).any(axis=1)))
    sample = np.repeat(np.arange(len(first)), np.diff(first, append=len(names)))
    if len(np.unique(sample * len(_SUFFIXES) + kind)) < len(names):
        return None
    text = [key.decode() for key in keys[first].view(f"S{keys.shape[1]}")[:, 0].tolist()]
    return SampleSpans(text, np.append(first, len(names)), _SUFFIXES[kind], members.starts, members.stops)
