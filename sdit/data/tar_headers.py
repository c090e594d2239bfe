"""The members of a tar file in memory, found without a Python object for each header.

tarfile holds the interpreter lock while it parses a member. The shards that sdit writes have only plain
POSIX headers, which array operations check together. M members.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BLOCK = 512
Spans = dict[str, slice]  # where the members of a sample are in its archive, by suffix
_SIZE, _SIZE_END = 124, 135  # eleven octal digits, then a NUL
_MAGIC = b"ustar\x0000"
_NUMBERS = np.r_[100:124, 136:148, 329:345]  # mode, owner, group, time, device: octal digits and NULs
_HEADER = np.dtype(
    {
        "names": ["name", "size_end", "checksum", "checksum_end", "type", "link", "magic", "prefix"],
        "formats": ["S100", "S1", ("u1", 6), "S2", "S1", "S100", "S8", "S155"],
        "offsets": [0, _SIZE_END, 148, 154, 156, 157, 257, 345],
        "itemsize": BLOCK,
    }
)


class Member(NamedTuple):
    """A file in a tar archive: its `name`, and the `span` of its bytes in the archive."""

    name: str
    span: slice


def plain_members(data: bytes) -> list[Member] | None:
    """Return the members of a tar archive, the same as tarfile finds. Return None if a header is not plain.

    A plain header is one that Python's tarfile writes for a regular file with a short ASCII name: POSIX format, octal
    size, unsigned checksum, no prefix and no link.
    """
    found = _walk(data)
    if found is None:
        return None
    starts, sizes = found
    blocks = np.frombuffer(data, np.uint8, count=len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)
    headers = blocks.take(np.asarray(starts, dtype=np.int64) // BLOCK, axis=0)
    if not _are_plain(headers):
        return None
    names = headers.view(_HEADER)[:, 0]["name"].tolist()
    if not all(name.isascii() and b"\0" not in name for name in names):
        return None
    bodies = [start + BLOCK for start in starts]
    return [
        Member(name.decode(), slice(body, body + size)) for name, body, size in zip(names, bodies, sizes, strict=True)
    ]


def _walk(data: bytes) -> tuple[list[int], list[int]] | None:
    """Return the position of each header and the size of its member. Return None if the archive does not end as it should."""
    starts, sizes, at = [], [], 0
    while data[at : at + 1] not in (b"", b"\0"):
        digits = data[at + _SIZE : at + _SIZE_END]
        if not digits.isdigit():
            return None
        try:
            size = int(digits, 8)
        except ValueError:  # an 8 or a 9
            return None
        starts.append(at)
        sizes.append(size)
        at += BLOCK + -(-size // BLOCK) * BLOCK
    return (starts, sizes) if starts and data[at : at + BLOCK] == bytes(BLOCK) else None


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
