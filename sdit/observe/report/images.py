"""Pictures inside the page, as data URIs of bounded size."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from sdit.observe.routing_pictures import heat

MAX_ROWS = 250  # of a heat map: more could not be told apart at the size it is shown


def data_uri(body: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(body).decode('ascii')}"


def heat_uri(values: np.ndarray, colours: str, top: float = 1.0) -> str:
    """A PNG with a pixel per value of (rows, columns), 0 to `top`; of many rows every n-th."""
    return picture_uri(heat(values[:: max(1, -(-len(values) // MAX_ROWS))], colours, top))


def picture_uri(picture: Image.Image) -> str:
    """A PNG as small as it gets: of few colours, if it has few."""
    few = picture.quantize(256) if picture.mode == "RGB" else picture
    file = io.BytesIO()
    few.save(file, format="PNG", optimize=True)
    return data_uri(file.getvalue(), "png")


def file_uri(path: Path, max_bytes: int) -> str | None:
    """The picture in a file, made smaller until it takes at most `max_bytes`; None if it cannot be read."""
    try:
        with Image.open(path) as opened:
            opened.load()
            picture = opened.convert("L" if opened.mode == "L" else "RGB")
        if path.stat().st_size <= max_bytes:
            return data_uri(path.read_bytes(), "png")
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    for side, quality in ((1200, 85), (800, 80), (500, 75), (300, 60), (150, 40)):
        smaller = picture.copy()
        smaller.thumbnail((side, side))
        file = io.BytesIO()
        smaller.save(file, format="JPEG", quality=quality)
        if file.tell() <= max_bytes:
            break
    return data_uri(file.getvalue(), "jpeg")
