"""A folder of image files as a set of images. n images, H = W pixels, C channels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from sdit.data.decode import IMAGE_FORMATS
from sdit.data.folders import folder_source
from sdit.data.image_file import read_image
from sdit.data.index import INDEX_NAME
from sdit.errors import ConfigError, DataError

BATCH = 100
NAMED = 3  # files that a message or the result names
GREY = ("1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
Shape = tuple[int, int, int]


def is_tree(path: Path) -> bool:
    """Whether a path is a folder that no preparation wrote."""
    return path.is_dir() and not (path / INDEX_NAME).exists() and not any(path.glob("*.tar"))


@dataclass(frozen=True)
class ImageTree:
    """The image files under `root`, sorted paths `names`; `left_out` counts the other files by their endings."""

    root: Path
    names: tuple[str, ...]
    left_out: dict[str, int]
    skip_bad: bool

    def common_shape(self, size: int | None) -> Shape:
        """(size, size, C), or what all images have in common. Raises: DataError for images of several sizes."""
        sizes: dict[tuple[int, int], str] = {}
        is_grey = True
        for name in self.names:
            header = self._header(name)
            if header is not None:
                sizes.setdefault(header[0], name)
                is_grey = is_grey and header[1] in GREY
        if not sizes:
            raise DataError(f"{self.root}: none of {len(self.names)} images can be decoded")
        channels = 1 if is_grey else 3
        if size is not None:
            return (size, size, channels)
        if len(sizes) > 1 or any(width != height for width, height in sizes):
            found = ", ".join(f"{width} x {height} ({name})" for (width, height), name in list(sizes.items())[:NAMED])
            legal = "legal: square images of one size, or --size N, which resizes and crops as ADM does"
            raise DataError(f"{self.root}: images of {found}{', ...' if len(sizes) > NAMED else ''}; {legal}")
        return (min(sizes)[0], min(sizes)[0], channels)

    def _header(self, name: str) -> tuple[tuple[int, int], str] | None:
        """(width, height) and mode; None for a bad file that is to be skipped."""
        try:
            with Image.open(self.root / name, formats=sorted(set(IMAGE_FORMATS.values()))) as image:
                return image.size, image.mode
        except Exception as error:  # Pillow's decoders raise almost anything on hostile bytes
            if self.skip_bad:
                return None
            raise DataError(_bad(f"{self.root / name}: cannot be decoded: {error}")) from None


def open_tree(root: Path, skip_bad: bool) -> ImageTree:
    """List the images of a folder and its subfolders; hidden ones are none. Raises: DataError."""
    names: list[str] = []
    left_out: Counter[str] = Counter()
    tops = [root, *sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))]
    for top in tops:  # a class folder may be a link
        for parent, folders, files in os.walk(top, onerror=_unlisted):
            folders[:] = [] if top == root else [name for name in folders if not name.startswith(".")]
            for name in files:
                ending = name.rpartition(".")[2].lower() if "." in name else ""
                if name.startswith("."):
                    left_out["hidden"] += 1
                elif ending not in IMAGE_FORMATS:
                    left_out[f".{ending}" if ending else name] += 1
                else:
                    names.append(str((Path(parent) / name).relative_to(root)))
    if not names:
        raise DataError(f"{root}: holds no images; legal endings: {', '.join(IMAGE_FORMATS)}")
    return ImageTree(root, tuple(sorted(names)), dict(left_out.most_common()), skip_bad)


class TreeImages:
    """The images of a tree, resized and cropped to `shape` as preparation does; an ImageSet.

    `is_sample`: colours that `shape` has no room for are an error, because the images are what is scored.
    """

    def __init__(self, tree: ImageTree, shape: Shape, is_sample: bool) -> None:
        if shape[0] != shape[1]:
            raise ConfigError(f"{tree.root}: image files are cropped to squares, not to {shape}; legal: an npz")
        self.name, self.count, self.shape = str(tree.root), len(tree.names), shape
        self._tree, self._is_sample = tree, is_sample
        self._bad: dict[str, str] = {}

    @property
    def facts(self) -> dict[str, Any]:
        """Where the images are from and what was done to them, as JSON; complete once they were read."""
        bad = list(self._bad)
        return {
            "folder": self.name,
            "files": len(self._tree.names),
            "shape": list(self.shape),
            "crop": "box filter by halves, bicubic, central square, as ADM; unchanged where the size fits",
            "other_files": self._tree.left_out,
            "bad": {"count": len(bad), "first": bad[:NAMED]},
        }

    def notes(self) -> list[str]:
        """What was left out, one sentence each."""
        found = []
        if self._tree.left_out:
            kinds = ", ".join(f"{count} {ending}" for ending, count in self._tree.left_out.items())
            found.append(f"{self.name}: left out files that are hidden or no images by their ending: {kinds}")
        if self._bad:
            first = "; ".join(list(self._bad.values())[:NAMED])
            found.append(f"{self.name}: left out {len(self._bad)} of {self.count} images: {first}")
        return found

    def batches(self) -> Iterator[np.ndarray]:
        """All images in the order of their paths, (n, H, W, C) uint8."""
        held: list[np.ndarray] = []
        for name in self._tree.names:
            pixels = self._pixels(name)
            if pixels is not None:
                held.append(pixels)
            if len(held) == BATCH:
                yield np.stack(held)
                held = []
        if held:
            yield np.stack(held)

    def _pixels(self, name: str) -> np.ndarray | None:
        """(H, W, C) of a file; None if it is bad and to be skipped."""
        path, channels = self._tree.root / name, self.shape[2]
        try:
            pixels = read_image(path, self.shape[0], 3 if self._is_sample else channels).transpose(1, 2, 0)
        except DataError as error:
            if not self._tree.skip_bad:
                raise DataError(_bad(str(error))) from None
            self._bad[name] = str(error)
            return None
        if self._is_sample and channels == 1:
            if (pixels != pixels[..., :1]).any():
                raise DataError(f"{path}: has colours, but the images that it is compared with are grey")
            pixels = pixels[..., :1]
        return pixels


class LabelledTree(TreeImages):
    """The images of a tree with one folder for each class, which features can be learnt from.

    Raises: ConfigError, DataError.
    """

    def __init__(self, tree: ImageTree, shape: Shape) -> None:
        super().__init__(tree, shape, is_sample=False)
        source = folder_source(tree.root, shape[0], shape[2])
        self.classes = source.facts.classes
        self._labels = dict(source.files)
        unlabelled = [name for name in tree.names if name not in self._labels]
        if self.classes < 2:
            legal = "legal: one folder of images for each class, or --train-on with another data set"
            raise ConfigError(f"features: {tree.root} holds {self.classes} classes to learn; {legal}")
        if unlabelled:
            raise DataError(f"{tree.root / unlabelled[0]}: is in no class; legal: every image in a folder of its class")

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All images (N, H, W, C) uint8 and labels (N,) int64 in memory."""
        pixels = np.concatenate(list(self.batches()))
        labels = [self._labels[name] for name in self._tree.names if name not in self._bad]
        return pixels, np.array(labels, dtype=np.int64)


def _bad(message: str) -> str:
    return f"{message}; --skip-bad leaves such files out"


def _unlisted(error: OSError) -> NoReturn:
    if isinstance(error, PermissionError):
        raise DataError(f"{error.filename}: cannot be listed: {error.strerror}") from None
    raise error
