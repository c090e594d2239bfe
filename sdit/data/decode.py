"""Decoders from encoded samples to arrays, one for each allowed suffix. Nothing is unpickled.

C channels, H = W size, O orientations (1, or 2 if the moments of the mirrored image are stored too).
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from sdit.data.bad_samples import BadSample
from sdit.data.index import DatasetFacts

IMAGE_FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
METADATA_SUFFIXES = frozenset({"json", "txt"})  # kept for people to read, never decoded
ALLOWED_SUFFIXES = frozenset({*IMAGE_FORMATS, "npy", "cls"}) | METADATA_SUFFIXES
MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Sample:
    """One decoded sample with its `label`.

    `values` are (C, H, W) uint8 pixels, or the mean and log-variance (O, 2C, H, W) of a posterior, float16 or float32.
    """

    values: np.ndarray
    label: int


@dataclass(frozen=True)
class DecodedSamples:
    """The N samples of a shard, of which some or all are decoded into one array of n rows.

    `values` are (n, C, H, W) uint8 pixels, or moments (n, O, 2C, H, W), float16 or float32. `row` (N,) int64 is the row of a
    sample, or -1 if it is not decoded. `labels` (N,) int64 mean nothing for those.
    """

    values: np.ndarray
    labels: np.ndarray
    row: np.ndarray


def decode_sample(encoded: Mapping[str, bytes], facts: DatasetFacts, shard: str, key: str) -> Sample:
    """Return the sample whose members are `encoded`, by suffix.

    Raises: BadSample: if the sample does not match `facts` or cannot be decoded.
    """
    if facts.kind == "latents":
        if "npy" not in encoded:
            raise BadSample("no_image", shard, key, "has no npy member")
        values = _decode_moments(encoded["npy"], facts, shard, key)
    else:
        suffix = next((each for each in IMAGE_FORMATS if each in encoded), None)
        if suffix is None:
            raise BadSample("no_image", shard, key, f"has no image; legal: {', '.join(IMAGE_FORMATS)}")
        values = _decode_image(encoded[suffix], IMAGE_FORMATS[suffix], facts, shard, key)
    if "cls" not in encoded:
        raise BadSample("no_label", shard, key, "has no cls member")
    return Sample(values, _decode_label(encoded["cls"], facts, shard, key))


def _decode_image(data: bytes, image_format: str, facts: DatasetFacts, shard: str, key: str) -> np.ndarray:
    """Return pixels (C, H, W) uint8. Size and mode are checked first, so a decompression bomb takes no memory.

    Raises: BadSample: if the image cannot be decoded or has another size or mode.
    """
    try:
        with Image.open(io.BytesIO(data), formats=[image_format]) as image:
            if image.size != (facts.size, facts.size):
                detail = f"is {image.width} x {image.height} pixels, not {facts.size} x {facts.size}"
                raise BadSample("wrong_size", shard, key, detail)
            if image.mode != MODES.get(facts.channels):
                detail = f"has pixels of mode {image.mode}, not {facts.channels} channels of 8 bits"
                raise BadSample("wrong_channels", shard, key, detail)
            pixels = np.asarray(image)
    except BadSample:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on hostile bytes
        reason = str(error) or type(error).__name__
        raise BadSample("undecodable", shard, key, f"{image_format} cannot be decoded: {reason}") from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _decode_moments(data: bytes, facts: DatasetFacts, shard: str, key: str) -> np.ndarray:
    """Return moments (O, 2C, H, W) float16 or float32, a view of `data`.

    Raises: BadSample: if the array cannot be decoded, has another shape or type, or is not finite.
    """
    start, dtype = moments_layout(data, facts, shard, key)
    moments: np.ndarray = np.frombuffer(data, dtype, offset=start).reshape(moments_shape(facts))
    if not np.isfinite(moments).all():
        raise BadSample("non_finite", shard, key, "has moments that are not finite")
    return moments


def moments_shape(facts: DatasetFacts) -> tuple[int, int, int, int]:
    """Return the shape (O, 2C, H, W) of a sample's moments."""
    return (2 if facts.mirrored else 1, 2 * facts.channels, facts.size, facts.size)


def moments_layout(data: bytes, facts: DatasetFacts, shard: str, key: str) -> tuple[int, np.dtype]:
    """Return where the numbers of an npy file of moments begin, and their type: float16 or float32.

    Raises: BadSample: if the file is not whole, or the moments have another shape or type.
    """
    expected = moments_shape(facts)
    start = 10 + int.from_bytes(data[8:10], "little")  # magic, version, length of the header, header
    try:
        shape, column_major, dtype = _npy_header(data[:start])
    except Exception as error:  # numpy parses the header as Python text, which raises almost anything on hostile bytes
        raise BadSample("undecodable", shard, key, f"npy cannot be decoded: {error}") from error
    if shape != expected or column_major:
        raise BadSample("wrong_size", shard, key, f"has moments of shape {shape}, not {expected}")
    if dtype not in (np.dtype("<f4"), np.dtype("<f2")):
        raise BadSample("undecodable", shard, key, f"has moments of type {dtype}; legal: float32, float16")
    if len(data) - start != dtype.itemsize * math.prod(shape):
        raise BadSample("undecodable", shard, key, "npy is truncated or too long")
    return start, dtype


@lru_cache(maxsize=16)  # parsing takes longer than all other steps, and all samples have the same header
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    stream = io.BytesIO(header)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("not npy version 1.0")
    shape, column_major, dtype = np.lib.format.read_array_header_1_0(stream)
    return shape, column_major, dtype


def _decode_label(data: bytes, facts: DatasetFacts, shard: str, key: str) -> int:
    labels = max(facts.classes, 1)  # unlabelled samples have label 0
    if not re.fullmatch(rb"\d{1,9}\s*", data) or int(data) >= labels:
        raise BadSample("bad_label", shard, key, f"has label {data[:20]!r}; legal: 0..{labels - 1}")
    return int(data)


def encode_png(pixels: np.ndarray) -> bytes:
    """Return the PNG of pixels (C, H, W) uint8, grey or RGB. Equal pixels give equal bytes."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def encode_moments(moments: np.ndarray) -> bytes:
    """Return the npy file of moments (O, 2C, H, W), little-endian, without pickle."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(moments), version=(1, 0), allow_pickle=False)
    return stream.getvalue()
