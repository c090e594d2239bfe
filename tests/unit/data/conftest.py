"""Small prepared folders whose pictures carry their own number, so that a test knows every sample it is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdit.config import DataConfig, ModelConfig
from sdit.data.decode import encode_moments, encode_png
from sdit.data.index import DatasetFacts, DatasetIndex, write_index
from sdit.data.loader import build_loader
from sdit.data.shards import write_shard

SIZE = 4
CLASSES = 10
MARK = 255  # the upper right pixel; on the left in a mirrored picture


def picture(number: int) -> np.ndarray:
    """Pixels (1, 4, 4) uint8 that hold `number` < 65,280 and a mark on the right."""
    pixels = np.zeros((1, SIZE, SIZE), np.uint8)
    pixels[0, 0] = (number // 256, number % 256, 0, MARK)
    return pixels


def read_numbers(x0: np.ndarray) -> tuple[list[int], list[bool]]:
    """The numbers of loaded pictures (B, 1, 4, 4) float32, and which of them were mirrored."""
    rows = np.rint((x0[:, 0, 0] + 1) * 127.5).astype(int)
    mirrored = rows[:, 3] != MARK
    rows[mirrored] = rows[mirrored, ::-1]
    assert (rows[:, 3] == MARK).all()
    return (rows[:, 0] * 256 + rows[:, 1]).tolist(), mirrored.tolist()


def moments(number: int, mirrored: bool) -> np.ndarray:
    """Moments (O, 4, 4, 4) float32: mean `number`, negated in the mirrored orientation, and variance 4."""
    spread = np.full((2, SIZE, SIZE), np.log(4.0))
    upright = np.concatenate([np.full((2, SIZE, SIZE), number), spread])
    flipped = np.concatenate([np.full((2, SIZE, SIZE), -number), spread])
    return np.stack([upright, flipped] if mirrored else [upright]).astype(np.float32)


def write_folder(
    folder: Path, counts: Sequence[int], kind: str = "images", mirrored: bool = False, first_number: int = 0
) -> Path:
    """A prepared folder with `counts` samples in its shards; sample i is `picture(i)` or `moments(i)`, label i % 10."""
    folder.mkdir()
    records, start = [], first_number
    for shard, count in enumerate(counts):
        samples = []
        for number in range(start, start + count):
            latents = {"npy": encode_moments(moments(number, mirrored))}
            stored = latents if kind == "latents" else {"png": encode_png(picture(number))}
            samples.append((f"{number:09d}", {**stored, "cls": str(number % CLASSES).encode()}))
        record = write_shard(folder / f"shard-{shard:06d}.tar", samples)
        assert record is not None
        records.append(record)
        start += count
    facts = DatasetFacts(
        kind="latents" if kind == "latents" else "images",
        total=start - first_number,
        channels=2 if kind == "latents" else 1,
        size=SIZE,
        classes=CLASSES,
        mirrored=mirrored,
    )
    write_index(folder, DatasetIndex(facts=facts, recipe={}, shards=tuple(records)))
    return folder


@pytest.fixture
def pictures() -> SimpleNamespace:
    """`picture`, `moments`, `read_numbers` and `write_folder`."""
    return SimpleNamespace(picture=picture, moments=moments, read_numbers=read_numbers, write_folder=write_folder)


@pytest.fixture
def open_loader() -> Iterator[Any]:
    """Opens loaders, `(folder, seed=0, ranks=1, channels=1, **data)`, and closes them at the end."""
    with ExitStack() as stack:

        def open_one(folder: Path, seed: int = 0, ranks: int = 1, channels: int = 1, **data: Any) -> Any:
            config = DataConfig.model_validate({"source": "shards", "path": str(folder), **data})
            model = ModelConfig(input_size=SIZE, patch_size=2, channels=channels, classes=CLASSES)
            return stack.enter_context(build_loader(config, model, seed, ranks))

        yield open_one
