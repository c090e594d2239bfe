"""Tars of others read in place: the same images as prepared shards, and every change of a tar is noticed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdit import cli
from sdit.config import DataConfig, ModelConfig, load_config
from sdit.data.image_file import read_image
from sdit.data.loader import Loader, build_loader
from sdit.data.tar_index import read_tar_index
from sdit.errors import ConfigError, DataError, ExitCode
from tests.unit.data.archives import CLASSES, COUNT, encoded, write_tars

SIZE = 8


def prepare(*words: object) -> int:
    return cli.run(["prepare", *map(str, words)])


@pytest.fixture
def indexed(tmp_path: Path) -> Path:
    """Three indexed tars of images of 11 x 13 pixels."""
    members = {"png": lambda n: encoded(n, "PNG", 11, 13), "cls": lambda n: n % CLASSES}
    assert prepare("index", write_tars(tmp_path / "in", **members), "--out", tmp_path / "index", "--jobs", 1) == 0
    return tmp_path / "index"


@pytest.fixture
def open_loader() -> Iterator[Any]:
    with ExitStack() as stack:

        def open_one(folder: Path, source: str = "webdataset", ranks: int = 1, **data: Any) -> Loader:
            config = DataConfig.model_validate({"source": source, "path": str(folder), "streams": 2, **data})
            model = ModelConfig(input_size=SIZE, patch_size=2, channels=3, classes=CLASSES)
            return stack.enter_context(build_loader(config, model, 3, ranks))

        yield open_one


def expected(tmp_path: Path) -> dict[bytes, int]:
    found = {}
    for number in range(COUNT):
        (tmp_path / "one.png").write_bytes(encoded(number, "PNG", 11, 13))
        found[read_image(tmp_path / "one.png", SIZE, 3).tobytes()] = number % CLASSES
    return found


def levels(x0: np.ndarray) -> np.ndarray:
    return np.rint((x0 + 1) * 127.5).astype(np.uint8)


def test_each_image_is_read_once_an_epoch_cropped_to_the_input_size(
    indexed: Path, open_loader: Any, tmp_path: Path
) -> None:
    batch = open_loader(indexed).read(np.arange(COUNT))
    found = {image.tobytes(): label for image, label in zip(levels(batch.x0), batch.y.tolist(), strict=True)}
    assert found == expected(tmp_path)
    facts = open_loader(indexed).facts
    assert (facts.total, facts.classes, facts.size, facts.channels) == (COUNT, CLASSES, SIZE, 3)


def test_samples_and_order_equal_those_of_prepared_shards(indexed: Path, open_loader: Any, tmp_path: Path) -> None:
    """The copy that `sdit prepare webdataset` writes, in shards of the tars' size, trains on the same batches."""
    words = [str(tmp_path / "in"), "--size", SIZE, "--samples-per-shard", 10]
    assert prepare("webdataset", *words, "--out", tmp_path / "set") == 0
    here, copied = open_loader(indexed), open_loader(tmp_path / "set", "shards")
    for indices in (np.arange(0, 60), np.arange(60, 120, 2)):
        mine, theirs = here.read(indices), copied.read(indices)
        assert np.array_equal(mine.x0, theirs.x0) and np.array_equal(mine.y, theirs.y)
    alone = open_loader(indexed, ranks=2).read(np.arange(1, 60, 2))
    assert np.array_equal(alone.x0, here.read(np.arange(60)).x0[1::2])


def test_the_index_holds_no_image_and_repeating_it_keeps_every_tar(
    indexed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = read_tar_index(indexed)
    assert index.total == COUNT and [record.samples for record in index.shards] == [10, 10, 5]
    assert sum(path.stat().st_size for path in indexed.iterdir()) < 10_000
    before = (indexed / "tars.json").read_bytes()
    tars = [record.name for record in index.shards]
    assert prepare("index", *tars, "--out", indexed) == 0
    assert "0 tars hashed, 3 kept" in capsys.readouterr().out
    assert (indexed / "tars.json").read_bytes() == before
    assert prepare("--verify", indexed) == ExitCode.DONE
    assert f"3 tars, {COUNT} images, all intact" in capsys.readouterr().out


def test_an_interrupted_index_keeps_the_hashed_tars(indexed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = json.loads((indexed / "tars.json").read_text())
    before = (indexed / "tars.json").read_bytes()
    (indexed / "tars.json").unlink()
    lines = [json.dumps(index["recipe"]), json.dumps(index["shards"][0]), '{"cut']
    (indexed / "progress.jsonl").write_text("\n".join(lines))
    assert prepare("index", *(shard["name"] for shard in index["shards"]), "--out", indexed) == 0
    assert "2 tars hashed, 1 kept" in capsys.readouterr().out
    assert (indexed / "tars.json").read_bytes() == before and not (indexed / "progress.jsonl").exists()


@pytest.mark.parametrize("kind", ["byte", "cut", "gone", "fifo", "members"])
def test_a_changed_tar_is_excluded_by_name(
    indexed: Path, open_loader: Any, kind: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = Path(read_tar_index(indexed).shards[1].name)
    data = bytearray(tar.read_bytes())
    reason = {"byte": "checksum", "cut": "size", "gone": "missing", "fifo": "missing", "members": "checksum"}[kind]
    if kind == "byte":
        data[700] ^= 1
        tar.write_bytes(data)
    elif kind == "cut":
        tar.write_bytes(data[:-1024])
    elif kind == "members":
        members = indexed / "members-000001.npy"
        members.write_bytes(members.read_bytes()[:-1] + b"\1")
    else:
        tar.unlink()
        if kind == "fifo":
            os.mkfifo(tar)
    with pytest.raises(DataError, match=r"data.max_bad_fraction 0 allows 0"):
        open_loader(indexed).read(np.arange(COUNT))
    loader = open_loader(indexed, max_bad_fraction=0.5)
    batch = loader.read(np.arange(COUNT))
    assert loader.bad_samples.by_reason == {reason: 10} and len(batch.y) == COUNT
    assert sum(str(tar) in record.getMessage() for record in caplog.records) == 2  # once for each loader
    assert prepare("--verify", indexed) == ExitCode.DATA
    assert capsys.readouterr().err.startswith(str(tar))


def test_a_tar_that_changes_while_it_is_open_is_noticed(indexed: Path, open_loader: Any) -> None:
    loader = open_loader(indexed, max_bad_fraction=1)
    loader.read(np.arange(COUNT))
    tar = Path(read_tar_index(indexed).shards[0].name)
    data = tar.read_bytes()
    with tar.open("r+b") as file:
        file.write(data[:1])
    os.utime(tar, ns=(1, 1))
    loader.read(np.arange(COUNT))
    assert loader.bad_samples.by_reason == {"checksum": 10}


def test_a_tar_with_another_file_in_its_place_is_read_to_its_end(indexed: Path, open_loader: Any) -> None:
    loader = open_loader(indexed)
    first = loader.read(np.arange(COUNT))
    for record in read_tar_index(indexed).shards:
        shutil.copy(record.name, f"{record.name}.new")
        os.replace(f"{record.name}.new", record.name)
    assert np.array_equal(loader.read(np.arange(COUNT)).x0, first.x0)


def test_an_image_that_cannot_be_decoded_is_replaced_and_counted(tmp_path: Path, open_loader: Any) -> None:
    members = {"jpg": lambda n: b"junk" if n == 4 else encoded(n, "JPEG"), "cls": lambda n: n % CLASSES}
    assert prepare("index", write_tars(tmp_path / "in", **members), "--out", tmp_path / "index") == 0
    loader = open_loader(tmp_path / "index", max_bad_fraction=0.1)
    loader.read(np.arange(COUNT))
    assert loader.bad_samples.by_reason == {"undecodable": 1}
    assert "sample n01.00004.jpg: cannot be decoded" in loader.bad_samples.newest_fault
    assert prepare("--verify", tmp_path / "index") == ExitCode.DATA


def test_samples_without_a_label_stop_the_index_or_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    members = {"jpg": lambda n: encoded(n, "JPEG"), "cls": lambda n: b"-1" if n == 4 else b"2"}
    words = ["index", write_tars(tmp_path / "in", **members), "--out", tmp_path / "index"]
    assert prepare(*words) == ExitCode.DATA
    assert "sample n01.00004: has the label '-1'; legal: a number or a text; --skip-bad" in capsys.readouterr().err
    assert prepare(*words, "--skip-bad") == ExitCode.DONE
    assert "24 images in 3 tars, 3 classes" in capsys.readouterr().out
    assert "skipped: " in caplog.text and read_tar_index(tmp_path / "index").empty_classes == (0, 1)


def test_the_fingerprint_is_that_of_the_content(indexed: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "in", tmp_path / "moved")
    assert prepare("index", tmp_path / "moved", "--out", tmp_path / "again") == 0
    assert read_tar_index(tmp_path / "again").fingerprint == read_tar_index(indexed).fingerprint
    assert prepare("index", tmp_path / "in", "--exif", "--out", tmp_path / "exif") == 0
    assert read_tar_index(tmp_path / "exif").fingerprint != read_tar_index(indexed).fingerprint
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    words = ["index", tmp_path / "in", "--class-names", tmp_path / "names.txt", "--out", tmp_path / "named"]
    assert prepare(*words) == 0
    assert read_tar_index(tmp_path / "named").class_names == ("a", "b", "c")


def test_what_does_not_fit_is_one_line(indexed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ModelConfig(input_size=SIZE, patch_size=2, channels=4, classes=CLASSES)
    with pytest.raises(DataError, match=r"model.channels: 4, but data.source webdataset holds images; legal: 1"):
        build_loader(DataConfig(source="webdataset", path=str(indexed)), model, 0)
    with pytest.raises(DataError, match=r"tars.json: no such file; run: sdit prepare index TARS --out"):
        build_loader(DataConfig(source="webdataset", path=str(tmp_path)), model.model_copy(update={"channels": 3}), 0)
    with pytest.raises(ConfigError, match=r"data.path: must name a prepared folder when data.source is webdataset"):
        load_config(None, ["data.source=webdataset"])
    with pytest.raises(ConfigError, match=r"data.source: 'tars' is not legal"):
        load_config(None, ["data.source=tars"])
    (indexed / "tars.json").write_text("{}")
    with pytest.raises(DataError, match=r"tars.json: .*; index the tars again"):
        read_tar_index(indexed)
    other = write_tars(tmp_path / "other", count=3)
    assert prepare("index", other, "--out", indexed) == ExitCode.DATA
    assert capsys.readouterr().err.count("\n") == 1
