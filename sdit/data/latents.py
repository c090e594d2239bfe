"""Decodes the latents of a shard into one array when the shard is opened.

N samples of a shard, C channels, H = W size, O orientations (1, or 2 if the moments of the mirrored image are stored too).
"""

from __future__ import annotations

import math

import numpy as np

from sdit.data.bad_samples import BadSample
from sdit.data.decode import DecodedSamples, moments_layout, moments_shape
from sdit.data.index import DatasetFacts
from sdit.data.tar_headers import BLOCK, SampleSpans

LABEL_DIGITS = 9


def decode_latents(data: bytes, samples: SampleSpans, facts: DatasetFacts) -> DecodedSamples:
    """Decode the samples that have the usual form. `data` is the tar archive that holds their members.

    The usual form is the npy header of the first sample that can be used, with finite numbers and a label of digits. These
    samples equal those of `decode_sample`. No bad sample is decoded here.
    """
    labels = _labels(data, samples, max(facts.classes, 1))
    starts, sizes = samples.column("npy")
    layout = _usual_layout(data, starts, sizes, facts)
    if layout is None:
        return DecodedSamples(np.empty(0), labels, np.full(len(samples), -1))
    header, dtype = layout
    shape = moments_shape(facts)
    length = len(header) + dtype.itemsize * math.prod(shape)
    in_blocks = starts + length <= len(data) // BLOCK * BLOCK
    usual = np.flatnonzero((sizes == length) & in_blocks & (labels >= 0))
    rows = _gather(data, starts[usual], length)
    values = rows[:, len(header) :].view(dtype).reshape(len(rows), *shape)
    is_good = (rows[:, : len(header)] == np.frombuffer(header, np.uint8)).all(axis=1)
    is_good &= np.isfinite(values).all(axis=(1, 2, 3, 4))
    row = np.full(len(samples), -1)
    row[usual[is_good]] = np.flatnonzero(is_good)
    return DecodedSamples(values, labels, row)


def _gather(data: bytes, starts: np.ndarray, length: int) -> np.ndarray:
    """Return `length` bytes from each of the positions `starts` (n,) of a tar archive, (n, length) uint8.

    In a tar archive each member begins with a block. One `take` of whole blocks releases the interpreter lock.
    """
    blocks = np.frombuffer(data, np.uint8, count=len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)
    wanted = starts[:, None] // BLOCK + np.arange(-(-length // BLOCK))
    return blocks.take(wanted, axis=0).reshape(len(starts), -1)[:, :length]


def _usual_layout(
    data: bytes, starts: np.ndarray, sizes: np.ndarray, facts: DatasetFacts
) -> tuple[bytes, np.dtype] | None:
    """Return the npy header and the type of the first moments that can be used. Return None if there are none."""
    for sample in np.flatnonzero(sizes >= 0).tolist():
        first = int(starts[sample])
        npy = data[first : first + int(sizes[sample])]
        try:
            start, dtype = moments_layout(npy, facts, "", "")
        except BadSample:
            continue  # it is reported when it is read
        return npy[:start], dtype
    return None


def _labels(data: bytes, samples: SampleSpans, labels: int) -> np.ndarray:
    """Return the label of each sample, (N,) int64. It is -1 without a label of one to nine digits below `labels`."""
    starts, sizes = samples.column("cls")
    place = np.arange(LABEL_DIGITS)
    is_digit = place < sizes[:, None]
    last = len(data) - 1
    digits = np.frombuffer(data, np.uint8).take(np.minimum(starts[:, None] + place, last)) - np.uint8(ord("0"))
    factors = 10 ** np.clip(sizes[:, None] - 1 - place, 0, LABEL_DIGITS - 1)
    values = (np.where(is_digit, digits, 0) * factors).sum(axis=1)
    is_good = (sizes > 0) & (sizes <= LABEL_DIGITS) & ((digits < 10) | ~is_digit).all(axis=1) & (values < labels)
    return np.where(is_good, values, -1)
