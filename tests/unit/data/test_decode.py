"""Every way a sample can be wrong has its reason, and names shard and key."""

from __future__ import annotations

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sdit.data.bad_samples import BadSample
from sdit.data.decode import decode_sample, encode_moments, encode_png
from sdit.data.index import DatasetFacts

GREY = DatasetFacts(kind="images", total=1, channels=1, size=4, classes=10)
COLOUR = DatasetFacts(kind="images", total=1, channels=3, size=4, classes=10)
UNLABELLED = DatasetFacts(kind="images", total=1, channels=1, size=4, classes=0)
LATENTS = DatasetFacts(kind="latents", total=1, channels=2, size=4, classes=10)
PNG = encode_png(np.zeros((1, 4, 4), np.uint8))
MOMENTS = np.zeros((1, 4, 4, 4), np.float32)


def image_file(mode: str, size: tuple[int, int] = (4, 4), image_format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, format=image_format)
    return stream.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims `width` x `height` pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + PNG[33:]


def npy(values: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def huge_npy() -> bytes:
    """A header that claims 4 TB."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    return stream.getvalue()


@pytest.mark.parametrize(
    ("facts", "encoded", "reason"),
    [
        (GREY, {"cls": b"1"}, "no_image"),
        (GREY, {"cls": b"1", "npy": npy(MOMENTS)}, "no_image"),
        (GREY, {"png": PNG}, "no_label"),
        (GREY, {"png": PNG[:45], "cls": b"1"}, "undecodable"),
        (GREY, {"png": b"", "cls": b"1"}, "undecodable"),
        (GREY, {"png": image_file("L", image_format="JPEG"), "cls": b"1"}, "undecodable"),
        (GREY, {"png": image_file("L", (4, 5)), "cls": b"1"}, "wrong_size"),
        (GREY, {"png": bomb(50_000, 50_000), "cls": b"1"}, "undecodable"),
        (GREY, {"png": bomb(5_000, 5_000), "cls": b"1"}, "wrong_size"),
        (GREY, {"png": bomb(0, 0), "cls": b"1"}, "undecodable"),
        (GREY, {"png": image_file("RGB"), "cls": b"1"}, "wrong_channels"),
        (GREY, {"png": image_file("I;16"), "cls": b"1"}, "wrong_channels"),
        (GREY, {"png": image_file("1"), "cls": b"1"}, "wrong_channels"),
        (COLOUR, {"png": PNG, "cls": b"1"}, "wrong_channels"),
        (COLOUR, {"png": image_file("RGBA"), "cls": b"1"}, "wrong_channels"),
        (COLOUR, {"jpg": image_file("CMYK", image_format="JPEG"), "cls": b"1"}, "wrong_channels"),
        (GREY, {"png": PNG, "cls": b"10"}, "bad_label"),
        (GREY, {"png": PNG, "cls": b"-1"}, "bad_label"),
        (GREY, {"png": PNG, "cls": b"cat"}, "bad_label"),
        (GREY, {"png": PNG, "cls": b""}, "bad_label"),
        (GREY, {"png": PNG, "cls": b"9" * 5000}, "bad_label"),
        (UNLABELLED, {"png": PNG, "cls": b"1"}, "bad_label"),
        (LATENTS, {"png": PNG, "cls": b"1"}, "no_image"),
        (LATENTS, {"npy": npy(MOMENTS)}, "no_label"),
        (LATENTS, {"npy": pickle.dumps(MOMENTS), "cls": b"1"}, "undecodable"),
        (LATENTS, {"npy": npy(np.array([{}], dtype=object), allow_pickle=True), "cls": b"1"}, "wrong_size"),
        (LATENTS, {"npy": npy(MOMENTS.astype(object), allow_pickle=True), "cls": b"1"}, "undecodable"),
        (LATENTS, {"npy": npy(MOMENTS)[:-1], "cls": b"1"}, "undecodable"),
        (LATENTS, {"npy": npy(MOMENTS)[:50], "cls": b"1"}, "undecodable"),
        (LATENTS, {"npy": b"", "cls": b"1"}, "undecodable"),
        (LATENTS, {"npy": npy(MOMENTS.astype(np.float64)), "cls": b"1"}, "undecodable"),
        (LATENTS, {"npy": npy(MOMENTS.astype(">f4")), "cls": b"1"}, "undecodable"),
        (LATENTS, {"npy": npy(np.asfortranarray(np.zeros((1, 4, 4, 4)))), "cls": b"1"}, "wrong_size"),
        (LATENTS, {"npy": npy(MOMENTS[:, :2]), "cls": b"1"}, "wrong_size"),
        (LATENTS, {"npy": huge_npy(), "cls": b"1"}, "wrong_size"),
        (LATENTS, {"npy": npy(MOMENTS + np.nan), "cls": b"1"}, "non_finite"),
        (LATENTS, {"npy": npy(MOMENTS - np.inf), "cls": b"1"}, "non_finite"),
    ],
)
def test_a_wrong_sample_is_refused_with_its_reason(facts: DatasetFacts, encoded: dict[str, bytes], reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        decode_sample(encoded, facts, "shard-7.tar", "000042")
    assert caught.value.reason == reason
    assert str(caught.value).startswith("shard-7.tar: sample 000042: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(("suffix", "facts"), [("png", GREY), ("png", COLOUR), ("webp", COLOUR)])
def test_lossless_images_come_back_exactly(suffix: str, facts: DatasetFacts) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (facts.channels, 4, 4), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels[0] if facts.channels == 1 else pixels.transpose(1, 2, 0)).save(stream, suffix, lossless=True)
    sample = decode_sample({suffix: stream.getvalue(), "cls": b"3\n", "json": b"{}"}, facts, "", "")
    assert np.array_equal(sample.values, pixels) and sample.label == 3


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_moments_come_back_exactly(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(dtype)
    sample = decode_sample({"npy": encode_moments(values), "cls": b"0"}, LATENTS, "", "")
    assert sample.values.dtype == dtype and np.array_equal(sample.values, values)


def test_faults_survive_a_trip_between_processes() -> None:
    fault = BadSample("no_label", "shard-7.tar", "000042", "has no cls member")
    copy = pickle.loads(pickle.dumps(fault))
    assert str(copy) == str(fault) and copy.reason == "no_label"
