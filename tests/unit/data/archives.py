"""Small archives in the formats that others use, written by each format's own library."""

from __future__ import annotations

import functools
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset import ShardWriter

COUNT, CLASSES, PIXELS = 25, 3, 16
NAMES = ("tabby, tabby cat", "dog", "cow")


def pixels(number: int, height: int = PIXELS, width: int = PIXELS) -> np.ndarray:
    """The pixels (height, width, 3) uint8 of image `number`."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(number: int, image_format: str = "PNG", height: int = PIXELS, width: int = PIXELS) -> bytes:
    """A file of image `number`; WebP is without loss."""
    stream = io.BytesIO()
    Image.fromarray(pixels(number, height, width)).save(stream, format=image_format, lossless=True)
    return stream.getvalue()


def write_tars(folder: Path, name: str = "train-%04d.tar", count: int = COUNT, **members: Any) -> str:
    """Tars of ten samples with keys such as n01.00007; `members` maps a suffix to a function of the number. The pattern."""
    members = members or {"png": encoded, "cls": lambda number: number % CLASSES}
    folder.mkdir(exist_ok=True)
    opened = functools.partial(open, mode="wb")  # with sdit imported, webdataset opens no local files
    with ShardWriter(str(folder / name), maxcount=10, verbose=0, opener=opened, compress=name.endswith("gz")) as writer:
        for number in range(count):
            values = {suffix: make(number) for suffix, make in members.items()}
            writer.write({"__key__": f"n01.{number:05d}", **values})
    return str(folder / name.replace("%04d", f"{{0000..{(count - 1) // 10:04d}}}"))


def table(count: int = COUNT) -> Any:
    """An Arrow table as `datasets` writes it, with the class names in its metadata."""
    import pyarrow

    features = {"image": {"_type": "Image"}, "label": {"names": list(NAMES), "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    images = pyarrow.array([{"bytes": encoded(number), "path": f"{number}.png"} for number in range(count)])
    labels = pyarrow.array([number % CLASSES for number in range(count)])
    return pyarrow.table({"image": images, "label": labels}).replace_schema_metadata(metadata)


def write_parquet(folder: Path) -> str:
    """Two Parquet files with row groups of seven."""
    import pyarrow.parquet

    rows = table()
    for number, (start, length) in enumerate([(0, 10), (10, 15)]):
        path = folder / f"train-{number:05d}-of-00002.parquet"
        pyarrow.parquet.write_table(rows.slice(start, length), path, row_group_size=7)
    return str(folder)


def write_arrow(folder: Path, kind: str) -> str:
    """An Arrow file in the `stream` or the `file` format, in batches of six."""
    import pyarrow

    path, rows = folder / f"{kind}.arrow", table()
    new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as file, new(file, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=6)
    return str(path)


def write_zip(path: Path, method: int = zipfile.ZIP_STORED, labels: Any = "pairs") -> str:
    """A zip in the layout of EDM's dataset_tool.py."""
    with zipfile.ZipFile(path, "w", method) as archive:
        pairs = []
        for number in range(COUNT):
            name = f"{number // 10:05d}/img{number:08d}.png"
            archive.writestr(name, encoded(number))
            pairs.append([name, number % CLASSES])
        archive.writestr("dataset.json", json.dumps({"labels": pairs if labels == "pairs" else labels}))
    return str(path)


def write_npz(path: Path, layout: str = "NHWC", compressed: bool = False) -> str:
    """Images and labels by numpy."""
    images = np.stack([pixels(number) for number in range(COUNT)])
    images = images.transpose(0, 3, 1, 2) if layout == "NCHW" else images
    names = ("arr_0", "arr_1") if layout == "NCHW" else ("images", "labels")
    (np.savez_compressed if compressed else np.savez)(
        path, **dict(zip(names, (images, np.arange(COUNT) % CLASSES), strict=True))
    )
    return str(path)


def write_source(folder: Path, kind: str) -> list[str]:
    """The words of `sdit prepare` after which only --out is missing, for an archive that it writes into `folder`."""
    folder.mkdir()
    size = ["--size", str(PIXELS)]
    match kind:
        case "tar":
            return ["webdataset", write_tars(folder), *size]
        case "tar.gz":
            json_label = {"webp": lambda n: encoded(n, "WEBP"), "json": lambda n: {"info": {"class": n % CLASSES}}}
            return ["webdataset", write_tars(folder, "t-%04d.tar.gz", **json_label), "--label-key", "info.class", *size]
        case "text labels":
            words = {"png": encoded, "txt": lambda number: ["tabby", "dog", "zebra"][number % CLASSES]}
            return ["webdataset", write_tars(folder, **words), *size]
        case "parquet":
            return ["parquet", write_parquet(folder), *size]
        case "arrow stream" | "arrow file":
            return ["parquet", write_arrow(folder, kind.split()[1]), *size]
        case "zip":
            return ["zip", write_zip(folder / "edm.zip"), *size]
        case "deflated zip":
            return ["zip", write_zip(folder / "edm.zip", zipfile.ZIP_DEFLATED), *size]
        case "npz":
            return ["npz", write_npz(folder / "images.npz")]
        case "compressed npz":
            return ["npz", write_npz(folder / "images.npz", "NCHW", compressed=True)]
    raise AssertionError(kind)


KINDS = (
    "tar", "tar.gz", "text labels", "parquet", "arrow stream", "arrow file", "zip", "deflated zip", "npz", "compressed npz",
)  # fmt: skip
