"""Where the samples of a tar archive are, in arrays. N samples, M members."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sdit.data.decode import ALLOWED_SUFFIXES
from sdit.data.tar_headers import Members

Spans = dict[str, slice]  # where the members of a sample are in its archive, by suffix
_SUFFIXES = np.array(sorted(ALLOWED_SUFFIXES))
_LONGEST = max(map(len, ALLOWED_SUFFIXES))


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
