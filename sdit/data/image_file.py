"""Reads one image file as pixels (C, size, size) uint8: converted to 8 bits by its depth, then cropped like ADM."""

from __future__ import annotations

import errno
import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sdit.data.decode import MODES
from sdit.data.names import shown
from sdit.errors import DataError

MAX_PIXELS = 2**26  # a 200 MB RGB image; the header of a small file can claim far more
FILE_FORMATS = {
    "png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "webp": "WEBP", "gif": "GIF",
    "bmp": "BMP", "tif": "TIFF", "tiff": "TIFF", "ppm": "PPM", "pgm": "PPM",
}  # fmt: skip
_PILLOW_FORMATS = sorted(set(FILE_FORMATS.values()))
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_WHITE_IS_ZERO, _UNSIGNED = 0, 1

# Errors of one file. Any other error number means that the file system failed, not the file.
# EINVAL: Pillow seeks to a negative offset that the file names.
FILE_ERRORS = frozenset({
    errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENXIO, errno.EINVAL,
    errno.EOVERFLOW,
})  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """How image files are converted to pixels. The defaults are ADM's.

    `background`: (R, G, B) behind transparent pixels. None: the colours of transparent pixels are used as they are.
    `exif`: rotate the image by its EXIF orientation. Pillow rotates TIFF images in any case.
    """

    background: tuple[int, int, int] | None = None
    exif: bool = False

    @property
    def recipe(self) -> dict[str, Any]:
        """The options as JSON, as an index stores them."""
        return {"background": None if self.background is None else list(self.background), "exif": self.exif}


AS_ADM = Reading()


def read_image(path: Path, size: int, channels: int, reading: Reading = AS_ADM) -> np.ndarray:
    """Return the central square of an image file, (C, size, size) uint8. Of several frames the first is read.

    Raises:
        DataError: if the file is not a regular file, cannot be opened or decoded, is too large, or has values of an
            unknown range.
        OSError: if the file system fails.
    """
    with _opened(path) as image:
        _refuse_too_large(path, image.size, size)
        return square_pixels(image, size, channels, reading)


def decode_image(data: bytes, name: str, size: int, channels: int, reading: Reading = AS_ADM) -> np.ndarray:
    """Return the central square of the image file whose bytes are `data`, as `read_image` does. `name` is for messages.

    Raises: DataError: if the bytes cannot be decoded, the image is too large, or its values have an unknown range.
    """
    if not data:
        raise DataError(f"{shown(name)}: cannot be decoded: the file is empty")
    with _pillow_errors(name), Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
        _refuse_too_large(name, image.size, size)
        return square_pixels(image, size, channels, reading)


def square_pixels(image: Image.Image, size: int, channels: int, reading: Reading = AS_ADM) -> np.ndarray:
    """Return the central square of an image, (C, size, size) uint8."""
    pixels = np.asarray(center_crop(eight_bits(image, channels, reading), size))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def eight_bits(image: Image.Image, channels: int, reading: Reading = AS_ADM) -> Image.Image:
    """Return an image of any mode as grey ("L", 1 channel) or colour ("RGB", 3 channels).

    Raises: ValueError: if the range of the values is unknown.
    """
    depth, white_is_zero = _depth(image), _white_is_zero(image)
    if reading.exif:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = _scaled_grey(image, depth, white_is_zero)
    if image.mode == "La":
        image = image.convert("LA")
    if reading.background is not None and image.has_transparency_data:
        solid = Image.new("RGBA", image.size, (*reading.background, 255))
        image = Image.alpha_composite(solid, image.convert("RGBA"))
    image.info.pop("transparency", None)  # Pillow would also convert it, and fails on values above 255
    if image.mode == "LAB":
        image = image.convert("RGB")
    return image.convert(MODES[channels])


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the central square of an image, `size` pixels wide.

    The image is halved with a box filter while both sides are at least 2 x size. It is then resized (bicubic) until the
    short side is `size`, then cropped. This is the preprocessing of ADM (Dhariwal and Nichol 2021), which published FIDs
    use.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = image.resize(_fitted(image.size, size), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _fitted(sides: tuple[int, int], size: int) -> tuple[int, int]:
    """Return width and height of an image after its short side is resized to `size`."""
    scale = size / min(sides)
    return round(sides[0] * scale), round(sides[1] * scale)


def _refuse_too_large(name: object, sides: tuple[int, int], size: int) -> None:
    width, height = sides
    if width * height > MAX_PIXELS:
        raise DataError(f"{shown(name)}: {width} x {height} pixels; legal: up to {MAX_PIXELS} in all")
    fitted = _fitted(sides, size)
    if min(sides) < size and fitted[0] * fitted[1] > MAX_PIXELS:
        raise DataError(
            f"{shown(name)}: {width} x {height} pixels, {fitted[0]} x {fitted[1]} when enlarged to a short side of "
            f"{size}; legal: up to {MAX_PIXELS} in all"
        )


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open the image in a regular file.

    Raises:
        DataError: if the file or its bytes cause an error.
        OSError: if the file system fails.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait for a writer
            raise DataError(f"{shown(path)}: cannot be read: it is no regular file")
        if os.stat(path).st_size == 0:
            raise DataError(f"{shown(path)}: cannot be decoded: the file is empty")
        with path.open("rb") as file, warnings.catch_warnings(), _pillow_errors(path):
            warnings.simplefilter("ignore")  # about sizes, which are bounded here, and about metadata
            with Image.open(file, formats=_PILLOW_FORMATS) as image:
                yield image
    except OSError as error:
        if error.errno not in FILE_ERRORS:
            raise OSError(error.errno, error.strerror, str(path)) from error
        broken = " (a broken symbolic link)" if path.is_symlink() and error.errno == errno.ENOENT else ""
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror}{broken}") from error


@contextmanager
def _pillow_errors(name: object) -> Iterator[None]:
    """Convert the errors of Pillow's decoders in the `with`.

    Raises:
        DataError: in place of an error of the decoder.
        OSError: if the file system fails.
    """
    try:
        yield
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{shown(name)}: cannot be decoded: it is none of {', '.join(_PILLOW_FORMATS)}") from None
    except Image.DecompressionBombError:
        raise DataError(f"{shown(name)}: too many pixels; legal: up to {MAX_PIXELS} in all") from None
    except MemoryError as error:
        raise DataError(f"{shown(name)}: cannot be decoded: not enough memory (MemoryError)") from error
    except OSError as error:
        if error.errno is not None:  # raised by the file system, not by Pillow
            raise
        raise DataError(f"{shown(name)}: cannot be decoded: {error}") from error
    except Exception as error:  # Pillow's decoders raise almost anything on hostile bytes
        raise DataError(f"{shown(name)}: cannot be decoded: {str(error) or type(error).__name__}") from error


def _depth(image: Image.Image) -> int | None:
    """Return the bits of a grey value in the file, for modes with more than 8 bits. Return None if the range is unknown."""
    if image.mode == "F":
        return None
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        unsigned = tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED
        return int(tags.get(_BITS_PER_SAMPLE, (1,))[0]) if unsigned else None
    return 16 if image.mode.startswith("I;16") or image.format in ("PNG", "PPM") else None


def _white_is_zero(image: Image.Image) -> bool:
    tags = getattr(image, "tag_v2", None)
    return tags is not None and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO


def _scaled_grey(image: Image.Image, depth: int | None, white_is_zero: bool) -> Image.Image:
    """Return the "L" or "LA" image in which 255 is the largest value of `depth` bits. Pillow's conversion clips at 255.

    Raises: ValueError: if `depth` is None.
    """
    if depth is None:
        raise ValueError(
            f"its values (mode {image.mode}) are signed or floating-point and have no known range; "
            "legal: unsigned integers"
        )
    values = np.asarray(image)
    if depth > 16:
        values = (values.view(np.uint32) >> (depth - 16)).astype(np.uint16)  # Pillow reads unsigned values as signed
        depth = 16
    largest = 2**depth - 1
    table = np.rint(np.arange(2**16).clip(max=largest) * (255 / largest)).astype(np.uint8)
    scaled = table[np.clip(values, 0, 2**16 - 1)]
    grey = Image.fromarray(255 - scaled if white_is_zero else scaled)  # Pillow inverts only up to 8 bits
    if isinstance(key := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey
