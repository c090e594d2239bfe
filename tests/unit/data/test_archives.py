"""Images in archives that others made: each image once, with its label, and the same bytes after an interruption."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdit import cli
from sdit.data.index import read_index
from sdit.data.path_patterns import matching_files
from sdit.data.record_labels import read_class_names
from sdit.data.records import RecordOptions, record_source
from sdit.data.shards import read_shard
from sdit.data.tar_records import TarArchive
from sdit.errors import ConfigError, ExitCode
from tests.unit.data import archives
from tests.unit.data.archives import CLASSES, COUNT, KINDS, NAMES, PIXELS, encoded, pixels, write_source, write_tars


def prepare(*words: object) -> int:
    try:
        return cli.run(["prepare", *map(str, words)])
    except SystemExit as end:
        return int(end.code or 0)


def samples(folder: Path) -> list[tuple[np.ndarray, int]]:
    """All samples of a prepared folder in order, pixels (H, W, C)."""
    index = read_index(folder)
    shards = [read_shard(folder, record, index.facts) for record in index.shards]
    found = [shard.sample(member) for shard in shards for member in range(len(shard))]
    return [(sample.values.transpose(1, 2, 0), sample.label) for sample in found]


@pytest.mark.parametrize("kind", KINDS)
def test_each_image_is_prepared_once_with_its_label(tmp_path: Path, kind: str) -> None:
    words = write_source(tmp_path / "in", kind)
    assert prepare(*words, "--out", tmp_path / "set", "--samples-per-shard", 8, "--jobs", 1) == ExitCode.DONE
    found = {image.tobytes(): label for image, label in samples(tmp_path / "set")}
    labels = (1, 0, 2) if kind == "text labels" else (0, 1, 2)  # texts are sorted
    assert found == {pixels(number).tobytes(): labels[number % CLASSES] for number in range(COUNT)}
    facts = read_index(tmp_path / "set").facts
    assert (facts.total, facts.size, facts.channels, facts.classes) == (COUNT, PIXELS, 3, CLASSES)
    assert prepare("--verify", tmp_path / "set") == ExitCode.DONE


@pytest.mark.parametrize(
    ("kind", "jobs"), [("tar", 1), ("tar.gz", 1), ("parquet", 2), ("zip", 1), ("compressed npz", 1)]
)
def test_an_interrupted_preparation_ends_with_the_same_bytes(tmp_path: Path, kind: str, jobs: int) -> None:
    words = [*write_source(tmp_path / "in", kind), "--samples-per-shard", 8]
    assert prepare(*words, "--out", tmp_path / "a", "--jobs", 1) == ExitCode.DONE
    assert prepare(*words, "--out", tmp_path / "b", "--jobs", jobs) == ExitCode.DONE
    (tmp_path / "b" / "shard-000001.tar").unlink()
    (tmp_path / "b" / "index.json").unlink()
    assert prepare(*words, "--out", tmp_path / "b", "--jobs", 1) == ExitCode.DONE
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"]
    assert contents[0] == contents[1] and len(contents[0]) == 5


def test_class_names_come_from_the_texts_the_schema_or_a_file(tmp_path: Path) -> None:
    expected = {"text labels": ("dog", "tabby", "zebra"), "parquet": NAMES}
    for kind, names in expected.items():
        words = write_source(tmp_path / kind, kind)
        assert prepare(*words, "--out", tmp_path / f"{kind} set") == ExitCode.DONE
        assert read_index(tmp_path / f"{kind} set").facts.class_names == names
    (tmp_path / "names.txt").write_text("zebra\ntabby\ncow\ndog\n")
    words = write_source(tmp_path / "again", "text labels")
    assert prepare(*words, "--class-names", tmp_path / "names.txt", "--out", tmp_path / "set") == ExitCode.DONE
    facts = read_index(tmp_path / "set").facts
    assert facts.class_names == ("zebra", "tabby", "cow", "dog") and facts.empty_classes == (2,)
    assert {label for _, label in samples(tmp_path / "set")} == {0, 1, 3}


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.txt", "x, y\nz\n"), ("a.json", '["x, y", "z"]'), ("a.json", '{"1": ["n2", "z"], "0": ["n1", "x, y"]}')],
)
def test_class_names_are_read_from_text_and_json(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_class_names(tmp_path / name) == ("x, y", "z")


def write_members(path: Path, **members: bytes) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_key_ends_at_the_last_dot(tmp_path: Path) -> None:
    """Keys with dots are keys of their own; other members of a sample are left out."""
    names = {"a/v1.jpg": encoded(0, "JPEG"), "a/v1.cls": b"0", "a/v1.2.JPG": encoded(1, "JPEG"), "a/v1.2.cls": b"1"}
    extras = {"b.png": encoded(2), "b.seg.png": encoded(3), "b.meta.json": b"{}", "b.cls": b"2\n", "c.mp3": b"x"}
    write_members(tmp_path / "a.tar", **names, **extras, **{"._b.png": b"x", "b.npy": b"x"})
    listing = TarArchive(tmp_path / "a.tar").list_records()
    assert listing.labels.values.tolist() == [0, 1, 2] and not listing.faults
    source = record_source([TarArchive(tmp_path / "a.tar")], "webdataset", RecordOptions(PIXELS))
    assert np.array_equal(list(source.images())[2].pixels, pixels(2).transpose(2, 0, 1))


def write_bad(folder: Path, kind: str) -> tuple[list[str], dict[str, str]]:
    """An archive with bad records, and the words of each line about one."""
    folder.mkdir()
    if kind == "webdataset":
        good = {f"{number}.png": encoded(number) for number in range(6)}
        bad = {"2.png": b"no image", "6.cls": b"1", "7.png": encoded(7), "8.png": encoded(8), "8.cls": b"-1"}
        bad |= {"9.png": encoded(9), "9.cls": b"1.5"}
        labels = {f"{number}.cls": b"%d" % (number % 2) for number in range(6)}
        members = dict(sorted({**good, **labels, **bad}.items()))
        write_members(folder / "a.tar", **members)
        (folder / "b.tar").write_bytes((folder / "a.tar").read_bytes()[:2600])
        files = [str(folder / "a.tar"), str(folder / "b.tar")]
        return ["webdataset", *files, "--size", "8"], {
            "2.png": "cannot be decoded", "sample 6": "has no image", "sample 7": "has no label", "sample 8": "has the label",
            "sample 9": "has the label '1.5', but most labels of the file are numbers", "b.tar": "cannot be read after",
        }  # fmt: skip
    if kind == "zip":
        archives.write_zip(
            folder / "a.zip", labels=[[f"00000/img0000000{n}.png", label] for n, label in enumerate([None, 0, 1, "x"])]
        )
        data = (folder / "a.zip").read_bytes()
        (folder / "a.zip").write_bytes(data.replace(encoded(1)[60:70], bytes(10)))
        return ["zip", str(folder / "a.zip"), "--size", "8"], {
            "img00000001": "CRC-32", "img00000000": "no class number in dataset.json", "img00000003": "but most labels",
        }  # fmt: skip
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": encoded(0), "path": None}, {"bytes": None, "path": "x.png"}, {"bytes": b"GIF89a", "path": None}]
    rows = pyarrow.table({"image": [*images, images[0]], "label": [0, 0, 1, None]})
    pyarrow.parquet.write_table(rows, folder / "a.parquet")
    return ["parquet", str(folder), "--size", "8"], {
        "row 1": "only the path x.png", "row 2": "cannot be decoded", "row 3": "has the label None",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["webdataset", "zip", "parquet"])
def test_bad_records_are_one_clear_line_each_and_counted(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words, lines = write_bad(tmp_path / "in", kind)
    assert prepare(*words, "--out", tmp_path / "set", "--jobs", 1) == ExitCode.DATA
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--skip-bad leaves out" in error
    status = prepare(*words, "--out", tmp_path / "set", "--jobs", 1, "--skip-bad", "--allow-empty-classes")
    assert status == ExitCode.DONE, capsys.readouterr().err
    skipped = [record.getMessage() for record in caplog.records if record.getMessage().startswith("skipped: ")]
    for where, reason in lines.items():
        assert sum(where in line and reason in line for line in skipped) == 1, (where, skipped)
    assert all("\n" not in line for line in skipped)
    assert f"{len(skipped)} images skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("webdataset", "none-{00..03}.tar", "--size", 8), "TAR: none-00.tar: no such file"),
        (("webdataset", "{0..", "--size", 8), "TAR: {0.."),
        (("webdataset", "text.tar", "--size", 8), "text.tar: cannot be read as a tar file"),
        (("webdataset", "t.tar", "t.tar", "--size", 8), "TAR: t.tar is named twice"),
        (("webdataset", "t.tar", "--size", 8, "--class-names", "none.txt"), "--class-names: none.txt: No such file"),
        (("webdataset", "t.tar", "--size", 8, "--class-names", "one.txt"), "--class-names: 1 names, but label"),
        (("webdataset", "t.tar", "--size", 8, "--label", "txt"), "no record has a label; legal: another --label or --label-key"),
        (("parquet", "t.tar", "--size", 8), "t.tar: cannot be read"),
        (("parquet", "p.parquet", "--size", 8, "--image-column", "x"), "--image-column: x for p.parquet; legal here: image"),
        (("parquet", "p.parquet", "--size", 8, "--label-column", "x"), "p.parquet; legal here: image, label"),
        (("parquet", "splits", "--size", 8), "splits holds several splits (train, validation); legal: a pattern"),
        (("zip", "t.tar", "--size", 8), "t.tar: cannot be read as a zip file"),
        (("zip", "bad.zip", "--size", 8), 'dataset.json: cannot be read; legal: {"labels"'),
        (("npz", "wide.npz"), "--size: is not set, and the images are 6 x 4 pixels"),
        (("npz", "float.npz"), "images has shape (2, 4, 4) and type float64; legal"),
        (("npz", "other.npz"), "holds x; legal: images and labels"),
        (("npz", "bad.zip"), "holds"),
        (("index", "z.tar.gz"), "z.tar.gz is compressed; legal: uncompressed tars"),
    ],
)  # fmt: skip
def test_what_cannot_be_prepared_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tars(tmp_path, "x-%04d.tar", 3)
    (tmp_path / "x-0000.tar").rename("t.tar")
    write_tars(tmp_path, "z-%04d.tar.gz", 3)
    (tmp_path / "z-0000.tar.gz").rename("z.tar.gz")
    (tmp_path / "text.tar").write_text("no tar")
    (tmp_path / "one.txt").write_text("cat\n")
    import pyarrow.parquet

    pyarrow.parquet.write_table(archives.table(3), "p.parquet")
    (tmp_path / "splits").mkdir()
    for name in ("train-0.parquet", "validation-0.parquet"):
        (tmp_path / "splits" / name).touch()
    with zipfile.ZipFile("bad.zip", "w") as archive:
        archive.writestr("a.png", encoded(0))
        archive.writestr("dataset.json", json.dumps({"classes": 1}))
    np.savez("wide.npz", images=np.zeros((2, 4, 6, 3), np.uint8))
    np.savez("float.npz", images=np.zeros((2, 4, 4)))
    np.savez("other.npz", x=np.zeros(1))
    status = prepare(*words, "--out", tmp_path / "set")
    error = capsys.readouterr().err
    assert status in (ExitCode.DATA, ExitCode.CONFIG) and error.count("\n") == 1, error
    assert message in error, error
    assert not (tmp_path / "set").exists()


def test_images_of_other_sizes_are_cropped_as_files_are(tmp_path: Path) -> None:
    """The pixels of an image are the same in each kind of archive as in a folder."""
    from sdit.data.image_file import read_image

    (tmp_path / "a.jpg").write_bytes(encoded(0, "JPEG", 37, 50))
    expected = read_image(tmp_path / "a.jpg", 8, 3)
    members = {"jpg": lambda n: encoded(n, "JPEG", 37, 50), "cls": lambda n: 0}
    words = ["webdataset", write_tars(tmp_path / "in", count=1, **members), "--size", 8]
    assert prepare(*words, "--out", tmp_path / "set") == ExitCode.DONE
    assert np.array_equal(samples(tmp_path / "set")[0][0].transpose(2, 0, 1), expected)


def test_patterns_keep_their_order(tmp_path: Path) -> None:
    for name in ("b-2.tar", "b-10.tar", "a.tar", ".hidden.tar", "c.txt"):
        (tmp_path / name).touch()
    found = matching_files([str(tmp_path / "b-{10,2}.tar"), str(tmp_path / "a*")], (".tar",), "TAR")
    assert [path.name for path in found] == ["b-10.tar", "b-2.tar", "a.tar"]
    assert [path.name for path in matching_files([str(tmp_path)], (".tar",), "TAR")] == ["a.tar", "b-10.tar", "b-2.tar"]
    with pytest.raises(ConfigError, match="no such file"):
        matching_files([str(tmp_path / "b-{2,3}.tar")], (".tar",), "TAR")


def test_records_sorted_by_class_are_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_class = {"png": encoded, "cls": lambda number: number // 10}
    assert prepare("webdataset", write_tars(tmp_path / "in", **by_class), "--size", 8, "--out", tmp_path / "set") == 0
    assert "sorted by class" in capsys.readouterr().out
    assert prepare(*write_source(tmp_path / "zip", "zip"), "--out", tmp_path / "z", "--samples-per-shard", 10) == 0
    assert [label for _, label in samples(tmp_path / "z")] != [number % CLASSES for number in range(COUNT)]


def test_unlabelled_records_have_no_classes(tmp_path: Path) -> None:
    words = write_source(tmp_path / "in", "tar")
    assert prepare(*words, "--unlabelled", "--out", tmp_path / "set") == ExitCode.DONE
    assert read_index(tmp_path / "set").facts.classes == 0


def test_a_bomb_in_a_zip_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member that unpacks to more than its directory says is refused after that many bytes."""
    from sdit.data import zip_records

    monkeypatch.setattr(zip_records, "MAX_MEMBER_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(10**6))
    listing = zip_records.ZipArchive(tmp_path / "a.zip").list_records()
    assert "legal: up to 1000" in listing.faults[0]
    ((_, content),) = zip_records.ZipArchive(tmp_path / "a.zip").read(listing.table)
    assert "CRC-32" in str(content)


def test_a_link_in_a_tar_is_a_bad_record(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert "not a plain file" in TarArchive(tmp_path / "a.tar").list_records().faults[0]


def test_images_are_as_in_a_folder_of_files(tmp_path: Path) -> None:
    """A palette PNG with transparency in a tar is read with --background as from a folder."""
    stream = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(stream, "PNG")
    words = ["webdataset", write_tars(tmp_path / "in", count=1, png=lambda n: stream.getvalue(), cls=lambda n: 0)]
    assert prepare(*words, "--size", 8, "--background", "white", "--out", tmp_path / "set") == ExitCode.DONE
    assert (samples(tmp_path / "set")[0][0] == 255).all()


def test_memory_holds_one_image_at_a_time(tmp_path: Path) -> None:
    """Listing, hashing and reading a tar of 64 MB take less memory than two of its eight images."""
    import tracemalloc

    from sdit.data.tar_index import TarOptions, index_tars

    side = 1632  # a BMP-like PNG without compression of 8 MB
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "PNG", compress_level=0)
    names = {
        f"{number}.{suffix}": data
        for number in range(8)
        for suffix, data in (("png", stream.getvalue()), ("cls", b"0"))
    }
    write_members(tmp_path / "a.tar", **names)
    size = (tmp_path / "a.tar").stat().st_size
    assert size > 60 * 2**20
    tracemalloc.start()
    try:
        source = record_source([TarArchive(tmp_path / "a.tar")], "webdataset", RecordOptions(8))
        index_tars([tmp_path / "a.tar"], TarOptions(), tmp_path / "index")
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
        assert sum(isinstance(image.pixels, np.ndarray) for image in source.images()) == 8
        assert tracemalloc.get_traced_memory()[1] < size // 2
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_source_can_be_sent_to_another_process(tmp_path: Path, kind: str, capsys: Any) -> None:
    """A pickled part yields the same images as the whole at its positions."""
    import argparse
    import pickle

    from sdit.cli.prepare_archives import archive_source
    from sdit.cli.prepare_options import command_line

    words = [*write_source(tmp_path / "in", kind), "--out", str(tmp_path / "set")]
    options = command_line().parse_args(words)
    assert isinstance(options, argparse.Namespace)
    source = archive_source(options)
    whole = list(source.images())
    part = list(pickle.loads(pickle.dumps(source.subset(7, 19))).images())
    for image, expected in zip(part, whole[7:19], strict=True):
        assert (image.key, image.label) == (expected.key, expected.label)
        assert np.array_equal(image.pixels, expected.pixels)
    assert source.labels.tolist() == [image.label for image in whole]


def test_without_pyarrow_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert prepare("parquet", tmp_path / "a.parquet", "--size", 8, "--out", tmp_path / "set") == ExitCode.CONFIG
    assert capsys.readouterr().err == ("error: Parquet and Arrow files need pyarrow; run: pip install sdit[parquet]\n")
