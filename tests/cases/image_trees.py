"""Image trees as people have them, and files that few programs write."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 64
RAMP = np.linspace(0, 255, SIDE).astype(np.uint8)
COLOURS = np.stack(
    [np.tile(RAMP, (SIDE, 1)), np.tile(RAMP[:, None], (1, SIDE)), np.full((SIDE, SIDE), 40, np.uint8)], -1
)


def write_image(path: Path, shift: int = 0) -> Path:
    """A colourful image of 64 x 64 pixels; another `shift`, another image, and practically another size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.roll(COLOURS, shift, 1) ^ np.uint8(shift)).save(path)
    return path


def write_tree(root: Path, *names: str) -> Path:
    """An image at each of the paths under `root`."""
    for number, name in enumerate(names):
        write_image(root / name, number)
    return root


def grey_ramp(largest: int) -> np.ndarray:
    """A ramp (64, 64) from 0 on the left to `largest` on the right, int64."""
    return np.tile(np.rint(np.linspace(0, largest, SIDE)).astype(np.int64), (SIDE, 1))


def write_png_16(path: Path, values: np.ndarray, transparent: int | None = None) -> None:
    """A PNG of 16 bits, grey (H, W) or RGB (H, W, 3); grey values `transparent` are transparent."""
    rows = values.astype(">u2").reshape(len(values), -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 0 if values.ndim == 2 else 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    if transparent is not None:
        chunks.insert(1, (b"tRNS", struct.pack(">H", transparent)))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def write_tiff(
    path: Path, values: np.ndarray, bits: int, white_is_zero: bool = False, big_endian: bool = False
) -> None:
    """A grey TIFF (H, W) of 12, 16 or 32 bits: unsigned, signed or floating-point as the array's type is."""
    order = ">" if big_endian else "<"
    if bits == 12:
        first, second = values.reshape(-1, 2).T.astype(np.uint16)
        data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    else:
        data = values.astype(f"{order}{values.dtype.kind}{bits // 8}").tobytes()
    tags = {
        256: values.shape[1],
        257: values.shape[0],
        258: bits,
        259: 1,
        262: 0 if white_is_zero else 1,
        273: 8,
        277: 1,
        278: values.shape[0],
        279: len(data),
        339: {"u": 1, "i": 2, "f": 3}[values.dtype.kind],
    }
    head = (b"MM\0*" if big_endian else b"II*\0") + struct.pack(f"{order}I", 8 + len(data))
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    path.write_bytes(head + data + struct.pack(f"{order}H", len(tags)) + entries + b"\0" * 4)


def save(mode: str, **options: object) -> Callable[[Path], None]:
    """Writes the grey ramp as an image of a mode."""
    return lambda path: Image.fromarray(grey_ramp(255).astype(np.uint8)).convert(mode).save(path, **options)  # type: ignore[arg-type]


def save_palette_with_alpha(path: Path) -> None:
    """Writes the grey ramp as palette colours, all of them transparent."""
    image = Image.fromarray(grey_ramp(255).astype(np.uint8)).convert("P")
    image.putpalette(bytes(value for level in range(256) for value in (level, level, level)))
    image.save(path, transparency=bytes(256))


def write_turned(path: Path) -> None:
    """A JPEG whose grey ramp runs to the right, and from top to bottom once its EXIF orientation is applied."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(grey_ramp(255).astype(np.uint8)).convert("RGB").save(path, exif=exif, quality=95)


def write_truncated(path: Path) -> None:
    """A JPEG without its second half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:20_000])


def write_latin_1(root: Path) -> None:
    """A class and an image whose names are no UTF-8, and a plain class."""
    folder = os.fsencode(root) + b"/cl\xe9"
    os.makedirs(folder)
    Image.fromarray(COLOURS).save(os.fsdecode(folder + b"/im\xe9.png"))
    write_image(root / "plain" / "a.png")
