"""Decodes the latents of a shard into one array when the shard is opened.

N samples of a shard, C channels, H = W size, O orientations (1, or 2 if the moments of the mirrored image are stored too).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sdit.data.decode import DecodedSamples, moments_layout, moments_shape
from sdit.data.faults import BadSample
from sdit.data.index import DatasetFacts
from sdit.data.tar_headers import BLOCK, Spans


def decode_latents(data: bytes, samples: Sequence[Spans], facts: DatasetFacts) -> DecodedSamples:
    """Decode the samples that have the usual form. `data` is the tar archive that holds their members.

    The usual form is the npy header of the first sample that can be used, with finite numbers and a label of digits. These
    samples equal those of `decode_sample`. Only the label takes Python code for each sample. No bad sample is decoded here.
    """
    labels = np.array([_label(data, spans, max(facts.classes, 1)) for spans in samples], dtype=np.int64)
    layout = _usual_layout(data, samples, facts)
    if layout is None:
        return DecodedSamples(np.empty(0), labels, np.full(len(samples), -1))
    header, dtype = layout
    shape = moments_shape(facts)
    length = len(header) + dtype.itemsize * math.prod(shape)
    lengths = np.array([spans["npy"].stop - spans["npy"].start if "npy" in spans else 0 for spans in samples])
    usual = np.flatnonzero((lengths == length) & (labels >= 0))
    rows = _gather(data, np.array([samples[member]["npy"].start for member in usual.tolist()], dtype=np.int64), length)
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


def _usual_layout(data: bytes, samples: Sequence[Spans], facts: DatasetFacts) -> tuple[bytes, np.dtype] | None:
    """Return the npy header and the type of the first moments that can be used. Return None if there are none."""
    for spans in samples:
        if "npy" in spans:
            npy = data[spans["npy"]]
            try:
                start, dtype = moments_layout(npy, facts, "", "")
            except BadSample:
                continue  # it is reported when it is read
            return npy[:start], dtype
    return None


def _label(data: bytes, spans: Spans, labels: int) -> int:
    """Return the label of a sample. Return -1 if it has no label of one to nine digits below `labels`."""
    span = spans.get("cls", slice(0, 0))
    if not 0 < span.stop - span.start < 10:
        return -1
    text = data[span]
    return int(text) if text.isdigit() and int(text) < labels else -1
