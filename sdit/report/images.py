"""Images in the page, as data URIs of limited size."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError


def data_uri(body: bytes, kind: str) -> str:
    """Return an image file as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(body).decode('ascii')}"


def pixels_uri(rgb: np.ndarray) -> str:
    """Return a PNG of pixels (height, width, 3) uint8 with a palette, which needs a third of the bytes."""
    file = io.BytesIO()
    Image.fromarray(rgb).quantize(256).save(file, format="PNG", optimize=True)
    return data_uri(file.getvalue(), "png")


def file_uri(path: Path, max_bytes: int) -> str | None:
    """Return the image in a file, reduced to at most `max_bytes`, or None if it cannot be read."""
    try:
        with Image.open(path) as opened:
            opened.load()
            image = opened.convert("L" if opened.mode == "L" else "RGB")
        if path.stat().st_size <= max_bytes:
            return data_uri(path.read_bytes(), "png")
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    for side, quality in ((1200, 85), (800, 80), (500, 75), (300, 60), (150, 40)):
        smaller = image.copy()
        smaller.thumbnail((side, side))
        file = io.BytesIO()
        smaller.save(file, format="JPEG", quality=quality)
        if file.tell() <= max_bytes:
            break
    return data_uri(file.getvalue(), "jpeg")
