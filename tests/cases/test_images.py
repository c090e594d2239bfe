"""Preparing images: nothing is dropped, clipped or mislabelled in silence."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from PIL import Image

from sdit.data.index import read_index
from sdit.data.prepare import verify
from sdit.data.shards import read_shard
from sdit.errors import ExitCode
from tests.cases import image_trees
from tests.cases.image_trees import SIDE, grey_ramp, save, write_image, write_png_16, write_tiff, write_tree

SCRIPT = Path(__file__).parents[2] / "launcher" / "prepare.py"
NOBODY = 65534


class Prepare:
    """The command line of prepare: `prepare(TREE, OUT, ...)` returns the exit status and keeps what was printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        spec = importlib.util.spec_from_file_location("prepare_script", SCRIPT)
        assert spec is not None and spec.loader is not None
        self._module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._module)
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, tree: Path, out: Path, *words: object, source: str = "folder") -> int:
        command = (source, "--images", tree, "--out", out, "--size", SIDE, "--jobs", 1, *words)
        if "--size" in words:
            command = (source, "--images", tree, "--out", out, "--jobs", 1, *words)
        try:
            status = int(self._module.main([str(word) for word in command]))
        except SystemExit as end:
            status = int(end.code or 0)
        self.out, self.err = self._capsys.readouterr()
        return status

    def refuses(
        self, tree: Path, out: Path, *words: object, status: ExitCode = ExitCode.DATA, source: str = "folder"
    ) -> str:
        """The one line of a refusal; nothing counts as complete."""
        assert self(tree, out, *words, source=source) == status, self.out + self.err
        lines = [line for line in self.err.splitlines() if not line.startswith("skipped: ")]
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        assert not (out / "index.json").exists()
        return lines[0]


@pytest.fixture
def prepare(capsys: pytest.CaptureFixture[str]) -> Prepare:
    return Prepare(capsys)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return tmp_path / "tree"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "set"


def samples(folder: Path) -> list[tuple[np.ndarray, int]]:
    """Pixels (C, H, W) uint8 and label of each prepared image."""
    index = read_index(folder)
    shards = [read_shard(folder, record, index.facts) for record in index.shards]
    read = [shard.sample(member) for shard in shards for member in range(len(shard))]
    return [(sample.values, sample.label) for sample in read]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def words_of(folder: Path) -> dict[str, int]:
    """The label of each class name."""
    return {name: label for label, name in enumerate(read_index(folder).facts.class_names)}


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """An AssertionError if the block hangs."""

    def hang(_: int, __: FrameType | None) -> None:
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Run the block as a user to whom file modes apply."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may enter and write."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder)


# ---- I1


def grey_16(path: Path) -> None:
    write_png_16(path, grey_ramp(65535))


DEEP = {
    "grey16.png": grey_16,
    "grey16.pgm": lambda path: Image.fromarray(grey_ramp(65535).astype(np.uint16)).save(path),
    "grey16.tiff": lambda path: write_tiff(path, grey_ramp(65535).astype(np.uint16), 16),
    "big_endian16.tiff": lambda path: write_tiff(path, grey_ramp(65535).astype(np.uint16), 16, big_endian=True),
    "inverted16.tiff": lambda path: write_tiff(
        path, 65535 - grey_ramp(65535).astype(np.uint16), 16, white_is_zero=True
    ),
    "grey12.tiff": lambda path: write_tiff(path, grey_ramp(4095).astype(np.uint16), 12),
    "grey32.tiff": lambda path: write_tiff(path, grey_ramp(2**32 - 1).astype(np.uint32), 32),
    "rgb16.png": lambda path: write_png_16(path, np.stack([grey_ramp(65535)] * 3, -1)),
    "transparent16.png": lambda path: write_png_16(path, grey_ramp(65535), transparent=65535),
    "alpha.png": save("LA"),
    "palette.png": save("P"),
    "palette_alpha.png": image_trees.save_palette_with_alpha,
    "cmyk.tiff": save("CMYK"),
    "cmyk.jpg": save("CMYK", quality=100),
    "luma.jpg": save("YCbCr", quality=100),
}


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("channels", [1, 3])
def test_values_are_scaled_by_their_bit_depth(
    prepare: Prepare, tree: Path, out: Path, name: str, channels: int
) -> None:
    """I1: An image of any mode keeps its ramp from 0 to 255, in grey and in colours."""
    (tree / "a").mkdir(parents=True)
    DEEP[name](tree / "a" / name)
    assert prepare(tree, out, "--channels", channels) == ExitCode.DONE, prepare.err
    ((pixels, _),) = samples(out)
    assert pixels.shape == (channels, SIDE, SIDE)
    assert np.abs(pixels.astype(int) - grey_ramp(255)).max() <= 2, pixels[0, 0]


def test_black_and_white_and_lab_images_are_read(prepare: Prepare, tree: Path, out: Path) -> None:
    """I1: One bit becomes 0 or 255; CIELAB becomes grey or RGB."""
    (tree / "a").mkdir(parents=True)
    Image.fromarray(grey_ramp(255) > 127).save(tree / "a" / "bits.png")
    Image.new("LAB", (SIDE, SIDE), (128, 128, 128)).save(tree / "a" / "lab.tiff")
    for channels in (1, 3):
        assert prepare(tree, out / str(channels), "--channels", channels) == ExitCode.DONE, prepare.err
        levels = sorted(np.unique(pixels).tolist() for pixels, _ in samples(out / str(channels)))
        assert levels[0] == [0, 255] and 110 < levels[1][0] <= levels[1][-1] < 130


@pytest.mark.parametrize("values", [grey_ramp(1) * 0.5, grey_ramp(30_000) - 15_000], ids=["float", "signed"])
def test_values_without_a_known_range_are_refused(prepare: Prepare, tree: Path, out: Path, values: np.ndarray) -> None:
    """I1: Floating-point and signed values are refused in one line, because their white is not known."""
    (tree / "a").mkdir(parents=True)
    write_tiff(tree / "a" / "x.tiff", values.astype(np.float32) if values.dtype.kind == "f" else values, 32)
    assert "no known range" in prepare.refuses(tree, out)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised AutoencoderKL that halves the image."""
    diffusers = pytest.importorskip("diffusers", reason="needs the extra sdit[vae]")
    folder = tmp_path_factory.mktemp("vae")
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=3,
    ).save_pretrained(folder)
    return folder


def test_latents_read_the_same_pixels(prepare: Prepare, vae: Path, tree: Path, tmp_path: Path) -> None:
    """I1: Latents of a 16-bit image are those of the same image with 8 bits."""
    for name, write in (("deep", grey_16), ("shallow", save("L"))):
        (tree / name / "a").mkdir(parents=True)
        write(tree / name / "a" / "x.png")
        assert prepare(tree / name, tmp_path / name, "--vae", vae, source="latents") == ExitCode.DONE, prepare.err
    ((deep, _),), ((shallow, _),) = samples(tmp_path / "deep"), samples(tmp_path / "shallow")
    assert np.abs(deep - shallow).max() < 0.1


def test_latents_refuse_and_report_alike(prepare: Prepare, vae: Path, tree: Path, out: Path) -> None:
    """I3, I4, I6: Latents are prepared under the same rules as images."""
    words = ("--vae", vae)
    write_tree(tree, "train/a/x.png", "train/b/x.png", "val/a/x.png")
    assert f"{tree}/train;" in prepare.refuses(tree, out, *words, source="latents")
    image_trees.write_truncated(tree / "train" / "a" / "z.jpg")
    assert "--skip-bad" in prepare.refuses(tree / "train", out, *words, source="latents")
    assert prepare(tree / "train", out, *words, "--skip-bad", source="latents") == ExitCode.DONE, prepare.err
    assert len(samples(out)) == 2


# ---- I2


@pytest.mark.parametrize(("folder", "mode"), [("b", 0o000), ("b/deep", 0o000), ("b", 0o444), ("", 0o000)])
def test_a_folder_without_permission_is_an_error(prepare: Prepare, public: Path, folder: str, mode: int) -> None:
    """I2: A folder that this user may not read ends preparation with 65 and its name."""
    tree = write_tree(public / "tree", "a/x.png", "b/x.png", "b/deep/x.png")
    (tree / folder).chmod(mode)
    with as_nobody():
        line = prepare.refuses(tree, public / "set")
    assert f"{tree / folder}: " in line and "Permission denied" in line


@pytest.mark.parametrize("folder", ["b", "b/deep", ""])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_folder_that_the_file_system_cannot_list_is_an_error(
    prepare: Prepare, tree: Path, out: Path, monkeypatch: pytest.MonkeyPatch, folder: str, code: int
) -> None:
    """I2: A failing file system ends preparation with 74 and the folder's name."""
    write_tree(tree, "a/x.png", "b/x.png", "b/deep/x.png")
    scandir = os.scandir

    def failing(path: str | Path = ".") -> object:
        if Path(path) == tree / folder:
            raise OSError(code, os.strerror(code))
        return scandir(path)

    monkeypatch.setattr("os.scandir", failing)
    assert f"{tree / folder}: {os.strerror(code)}" in prepare.refuses(tree, out, status=ExitCode.IO)


@pytest.mark.parametrize("words", [(), ("--skip-bad",)])
def test_an_image_that_the_file_system_cannot_read_is_no_bad_image(
    prepare: Prepare, tree: Path, out: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """I2: --skip-bad does not drop an image because of an input/output error; exit 74."""
    write_tree(tree, "a/x.png", "a/y.png")

    def failing(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), f"{tree}/a/x.png")

    monkeypatch.setattr("PIL.Image.open", failing)
    assert "Input/output error" in prepare.refuses(tree, out, *words, status=ExitCode.IO)


def test_an_image_that_disappears_is_no_bad_image(
    prepare: Prepare, tree: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I2: An image tree that is unmounted on the way is not skipped image by image."""
    write_tree(tree, *(f"a/{number}.png" for number in range(6)))
    opened = Image.open

    def unmounting(*words: object, **options: object) -> Image.Image:
        image = opened(*words, **options)  # type: ignore[arg-type]
        shutil.rmtree(tree, ignore_errors=True)
        return image

    monkeypatch.setattr("PIL.Image.open", unmounting)
    assert prepare(tree, out, "--skip-bad", "--samples-per-shard", 6) == ExitCode.IO
    assert not (out / "index.json").exists()


# ---- I3


@pytest.mark.parametrize(
    ("names", "likely"),
    [
        (("train/n1/a.png", "train/n2/a.png", "val/n1/a.png", "val/n2/a.png"), "train"),
        (("train/n1/a.png", "train/n2/a.png"), "train"),
        (("Training/n1/a.png", "Test/n1/a.png"), "Training"),
        (("data/train/n1/a.png", "data/val/n1/a.png"), "data/train"),
        (("part1/n1/a.png", "part2/n1/a.png", "part2/n2/a.png"), "part2"),
        (("train/a.png", "test/a.png"), "train"),
    ],
)
def test_a_folder_of_splits_is_refused(
    prepare: Prepare, tree: Path, out: Path, names: tuple[str, ...], likely: str
) -> None:
    """I3: train/ and val/ are not taken for classes; the likely folder is named."""
    write_tree(tree, *names)
    assert f"--images {tree / likely};" in prepare.refuses(tree, out)
    assert prepare(tree / likely, out) == ExitCode.DONE


def test_nested_classes_are_read_if_asked(prepare: Prepare, tree: Path, out: Path) -> None:
    """I3: Class folders that hold only folders are read with --nested-classes, and without it if one holds a file."""
    write_tree(tree, "cat/day/a.png", "dog/day/a.png")
    prepare.refuses(tree, out)
    assert prepare(tree, out, "--nested-classes") == ExitCode.DONE
    assert words_of(out) == {"cat": 0, "dog": 1}
    (tree / "cat" / "boxes.txt").touch()
    assert prepare(tree, out) == ExitCode.DONE


# ---- I4


def test_all_that_is_left_out_is_counted_and_listed(prepare: Prepare, tree: Path, out: Path) -> None:
    """I4: Files by ending, hidden files, ignored folders and images next to the class folders are listed."""
    write_tree(tree, "good/a.png", "good/.cache/a.png", "beside.png")
    for name in ("good/x.txt", "good/y.txt", "good/z.avi", "good/.DS_Store", "good/README", "__MACOSX/good/._a.png"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(b"x")
    assert prepare(tree, out) == ExitCode.DONE, prepare.err
    assert words_of(out) == {"good": 0} and len(samples(out)) == 1
    for text in ("2 .txt", "1 .avi", "1 without an ending", "good/.DS_Store", "__MACOSX", "good/.cache", "beside.png"):
        assert text in prepare.out, text


def test_nothing_is_said_where_nothing_is_left_out(prepare: Prepare, tree: Path, out: Path) -> None:
    """I4: A clean tree is reported without a line about omissions."""
    assert prepare(write_tree(tree, "a/x.png", "b/x.png"), out) == ExitCode.DONE
    assert "left out" not in prepare.out


@pytest.mark.parametrize(
    "name", ["x.gif", "x.bmp", "x.tiff", "x.tif", "x.webp", "x.PNG", "x.JPEG", "x.Bmp", "x.ppm", "x.jfif"]
)
def test_common_endings_are_read(prepare: Prepare, tree: Path, out: Path, name: str) -> None:
    """I4: Usual image formats are read, whatever the case of their ending."""
    write_tree(tree, "a/first.png")
    Image.new("RGB", (SIDE, SIDE), (200, 30, 60)).save(
        tree / "a" / name, format="JPEG" if name[-4:] == "jfif" else None
    )
    assert prepare(tree, out) == ExitCode.DONE, prepare.err
    assert len(samples(out)) == 2


def test_of_an_animation_the_first_frame_is_read(prepare: Prepare, tree: Path, out: Path) -> None:
    """I4: The first frame of a GIF is the image."""
    (tree / "a").mkdir(parents=True)
    first, second = (Image.new("L", (SIDE, SIDE), level) for level in (50, 200))
    first.save(tree / "a" / "x.gif", save_all=True, append_images=[second])
    assert prepare(tree, out) == ExitCode.DONE, prepare.err
    assert np.unique(samples(out)[0][0]).tolist() == [50]


@pytest.mark.parametrize("names", [("b/",), ("b/notes.txt",), ("b/.hidden.png",), ("b/c/",), ("b/.c/x.png",)])
def test_a_class_without_images_is_an_error_unless_allowed(
    prepare: Prepare, tree: Path, out: Path, names: tuple[str, ...]
) -> None:
    """I4: A label without an image needs --allow-empty-classes; then the labels of the others are as before."""
    write_tree(tree, "a/x.png", "c/x.png")
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).mkdir(parents=True) if name[-1] == "/" else (tree / name).touch()
    line = prepare.refuses(tree, out)
    assert "without images: b" in line and "--allow-empty-classes" in line
    assert prepare(tree, out, "--allow-empty-classes") == ExitCode.DONE, prepare.err
    assert "classes without images: 1: b" in prepare.out
    assert words_of(out) == {"a": 0, "b": 1, "c": 2} and sorted(label for _, label in samples(out)) == [0, 2]


def test_a_class_whose_images_are_all_skipped_is_an_error(prepare: Prepare, tree: Path, out: Path) -> None:
    """I4: --skip-bad does not empty a class unnoticed, also on the second try; --allow-empty-classes accepts it."""
    write_tree(tree, "a/x.png", "b/x.png", "b/y.png")
    (tree / "a" / "x.png").write_bytes(b"no image")
    for _ in range(2):
        assert "without images: a" in prepare.refuses(tree, out, "--skip-bad")
    assert prepare(tree, out, "--skip-bad", "--allow-empty-classes") == ExitCode.DONE, prepare.err
    assert prepare(tree, out, "--skip-bad", "--allow-empty-classes") == ExitCode.DONE
    assert len(samples(out)) == 2 and "0 shards written" in prepare.out


def test_linked_folders_are_read_and_loops_are_left_out(
    prepare: Prepare, tree: Path, out: Path, tmp_path: Path
) -> None:
    """I4: Links to folders are followed at every depth; a link to a parent is left out and listed."""
    write_tree(tree, "a/x.png")
    write_tree(tmp_path / "elsewhere", "y.png")
    (tree / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (tree / "a" / "loop").symlink_to(tree)
    (tmp_path / "elsewhere" / "back").symlink_to(tree / "a")
    (tree / "b").symlink_to(tmp_path / "elsewhere")
    with within(60):
        assert prepare(tree, out) == ExitCode.DONE, prepare.err
    assert words_of(out) == {"a": 0, "b": 1} and "a/loop" in prepare.out
    assert sum(label == 0 for _, label in samples(out)) == 2


def test_a_class_folder_link_that_leads_nowhere_is_an_error(prepare: Prepare, tree: Path, out: Path) -> None:
    """I4: A broken link next to the class folders is not a class that vanishes."""
    write_tree(tree, "a/x.png")
    (tree / "b").symlink_to("nowhere")
    assert f"{tree}/b: a broken symbolic link" in prepare.refuses(tree, out)


def test_the_prepared_folder_is_no_class_of_its_tree(prepare: Prepare, tree: Path) -> None:
    """I4: An output folder inside the image tree is left out when the command is repeated."""
    write_tree(tree, "a/x.png", "z/x.png")
    for _ in range(2):
        assert prepare(tree, tree / "prepared") == ExitCode.DONE, prepare.err
    assert words_of(tree / "prepared") == {"a": 0, "z": 1}


# ---- I5


def test_names_that_are_not_utf_8_are_stored_escaped(prepare: Prepare, tree: Path, out: Path) -> None:
    """I5: Class and file names that are not UTF-8 are prepared, and the same command keeps what is written."""
    image_trees.write_latin_1(tree)
    assert prepare(tree, out) == ExitCode.DONE, prepare.err
    assert words_of(out) == {"cl\\xe9": 0, "plain": 1} and "label 0: cl\\xe9" in prepare.out
    assert prepare(tree, out) == ExitCode.DONE and "0 shards written" in prepare.out


def test_bad_images_with_odd_names_are_named_in_one_line(
    prepare: Prepare, tree: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """I5: Line breaks and bytes that are not UTF-8 in a file name do not break the message."""
    write_tree(tree, "a/x.png")
    (tree / "a" / os.fsdecode(b"bad\n\xe9.png")).write_bytes(b"no image")
    assert "bad\\n\\xe9.png: cannot be decoded" in prepare.refuses(tree, out)
    assert prepare(tree, out, "--skip-bad") == ExitCode.DONE
    assert len(caplog.messages) == 1 and "bad\\n\\xe9.png: cannot be decoded" in caplog.messages[0]


def test_two_classes_with_one_stored_name_are_refused(prepare: Prepare, tree: Path, out: Path) -> None:
    """I5: An escaped name that another class has is refused before an image is read."""
    image_trees.write_latin_1(tree)
    write_tree(tree, "cl\\xe9/x.png")
    assert "two class folders are both stored as" in prepare.refuses(tree, out)
    assert not out.exists()


def test_an_output_folder_that_is_not_utf_8_is_refused_first(prepare: Prepare, tree: Path, tmp_path: Path) -> None:
    """I5: A name that is not UTF-8 in --out ends the command before its work, not after it."""
    write_tree(tree, "a/x.png")
    out = tmp_path / os.fsdecode(b"s\xe9t")
    assert prepare(tree, out) == ExitCode.USAGE
    assert not out.exists()


# ---- I6


@pytest.mark.parametrize("per_shard", [1, 4, 1024])
def test_skip_bad_continues_with_what_is_written(prepare: Prepare, tree: Path, out: Path, per_shard: int) -> None:
    """I6: The first error names --skip-bad, and adding only this option keeps the finished shards."""
    write_tree(tree, *(f"{name}/{number}.png" for name in "ab" for number in range(8)))
    image_trees.write_truncated(tree / "a" / "x.jpg")
    words = ("--samples-per-shard", per_shard)
    line = prepare.refuses(tree, out, *words)
    assert f"{tree}/a/x.jpg: " in line and "--skip-bad" in line
    before = shards(out)
    assert prepare(tree, out, *words, "--skip-bad") == ExitCode.DONE, prepare.err
    assert before.items() <= shards(out).items() and f"{len(before)} kept" in prepare.out
    assert "1 images skipped" in prepare.out and len(samples(out)) == 16
    assert prepare(tree, out, *words, "--skip-bad") == ExitCode.DONE and "1 images skipped" in prepare.out


def test_a_folder_with_skipped_images_is_not_called_whole(prepare: Prepare, tree: Path, out: Path) -> None:
    """I6: Without --skip-bad a folder that lacks images is not reported as done, and stays as it is."""
    write_tree(tree, "a/x.png", "a/y.png")
    (tree / "a" / "y.png").write_bytes(b"")
    assert prepare(tree, out, "--skip-bad") == ExitCode.DONE
    before = shards(out)
    assert prepare(tree, out) == ExitCode.DATA
    assert (
        prepare.err.count("\n") == 1 and "1 of its 2 images are missing" in prepare.err and "--skip-bad" in prepare.err
    )
    assert shards(out) == before and verify(out)[1] == []


# ---- I7


@pytest.mark.parametrize("sides", [(60_000, 1), (20_000, 2), (2, 20_000)])
def test_the_enlarged_size_is_bounded(prepare: Prepare, tree: Path, out: Path, sides: tuple[int, int]) -> None:
    """I7: A strip that would be enlarged to gigabytes is refused in one line that says so."""
    write_tree(tree, "a/y.png")
    Image.new("RGB", sides, (1, 2, 3)).save(tree / "a" / "strip.png")
    with limited_memory(1 * 2**30):
        line = prepare.refuses(tree, out, "--size", 256)
        assert f"strip.png: {sides[0]} x {sides[1]} pixels" in line and "enlarged" in line
        assert prepare(tree, out, "--size", 256, "--skip-bad") == ExitCode.DONE, prepare.err


@contextmanager
def limited_memory(more: int) -> Iterator[None]:
    """At most `more` bytes of address space in addition to what the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_lack_of_memory_is_named(prepare: Prepare, tree: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I7: An error without a text of its own is named."""
    write_tree(tree, "a/x.png")

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.Image.Image.resize", full)
    assert "x.png: cannot be decoded: not enough memory" in prepare.refuses(tree, out)


@pytest.mark.parametrize("sides", [(9_000, 8_000), (10_000, 10_000), (20_000, 10_000)])
def test_large_images_are_refused_without_a_warning(
    prepare: Prepare, tree: Path, out: Path, sides: tuple[int, int]
) -> None:
    """I7: The one bound on pixels is named, whatever Pillow's own bounds are."""
    (tree / "a").mkdir(parents=True)
    Image.new("1", sides).save(tree / "a" / "x.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert f"legal: up to {2**26}" in prepare.refuses(tree, out)
    assert not caught


# ---- I8


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{folder}/s")  # a socket's path may have 107 bytes only
        shutil.move(f"{folder}/s", path)


SPECIAL: dict[str, Callable[[Path], None]] = {
    "broken link": lambda path: path.symlink_to("nowhere.png"),
    "loop": lambda path: path.symlink_to(path.name),
    "link through a file": lambda path: path.symlink_to("y.png/x.png"),
    "FIFO": fifo,
    "link to a FIFO": lambda path: (fifo(path.with_name("f")), path.symlink_to("f"))[1],
    "socket": unix_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "empty": lambda path: path.touch(),
    "text": lambda path: [path.write_text("<html>404</html>"), None][1],
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_are_bad_images(prepare: Prepare, tree: Path, out: Path, kind: str) -> None:
    """I8: A link, FIFO, socket, device or empty file with an image's name is a bad picture, and never waited for."""
    write_tree(tree, "a/y.png")
    SPECIAL[kind](tree / "a" / "z.png")
    with within(60):
        line = prepare.refuses(tree, out)
        assert re.search(r"a/z\.png: cannot be (read|decoded): \S", line) and "--skip-bad" in line
        assert "<_io" not in line and "hangs" not in line
        assert prepare(tree, out, "--skip-bad") == ExitCode.DONE, prepare.err
    assert len(samples(out)) == 1 and "1 images skipped" in prepare.out


def test_an_image_without_permission_is_a_bad_image(prepare: Prepare, public: Path) -> None:
    """I8: A single file that this user may not read is named, and skipped if asked."""
    tree = write_tree(public / "tree", "a/x.png", "a/y.png")
    (tree / "a" / "y.png").chmod(0)
    with as_nobody():
        assert "y.png: cannot be read: Permission denied; --skip-bad" in prepare.refuses(tree, public / "set")
        assert prepare(tree, public / "set", "--skip-bad") == ExitCode.DONE, prepare.err


def test_a_folder_with_the_name_of_an_image_is_a_folder(prepare: Prepare, tree: Path, out: Path) -> None:
    """I8: A folder called x.png is read as a folder."""
    write_tree(tree, "a/x.png/y.png", "a/z.png")
    assert prepare(tree, out) == ExitCode.DONE, prepare.err
    assert len(samples(out)) == 2


# ---- I9


@pytest.mark.parametrize(
    ("words", "outside", "stored"),
    [
        ((), (200, 0, 100), None),
        (("--background", "white"), (255, 255, 255), [255, 255, 255]),
        (("--background", "black"), (0, 0, 0), [0, 0, 0]),
        (("--background", "10,20,30"), (10, 20, 30), [10, 20, 30]),
    ],
)
@pytest.mark.parametrize("mode", ["RGBA", "P", "tRNS"])
def test_the_background_is_chosen_and_recorded(
    prepare: Prepare,
    tree: Path,
    out: Path,
    words: tuple[str, ...],
    outside: tuple[int, int, int],
    stored: list[int] | None,
    mode: str,
) -> None:
    """I9: Hidden colours show by default, as in ADM; --background covers them and is recorded."""
    (tree / "a").mkdir(parents=True)
    alpha = np.full((SIDE, SIDE, 4), (200, 0, 100, 0), np.uint8)
    alpha[16:48, 16:48] = (10, 10, 10, 255)
    image = Image.fromarray(alpha)
    if mode == "RGBA":
        image.save(tree / "a" / "x.png")
    elif mode == "P":
        palette = Image.fromarray((alpha[..., 3] > 0).astype(np.uint8), "P")
        palette.putpalette([200, 0, 100, 10, 10, 10])
        palette.save(tree / "a" / "x.png", transparency=bytes([0, 255]))
    else:
        image.convert("RGB").save(tree / "a" / "x.png", transparency=(200, 0, 100))
    assert prepare(tree, out, *words) == ExitCode.DONE, prepare.err
    ((pixels, _),) = samples(out)
    assert tuple(pixels[:, 0, 0]) == outside and tuple(pixels[:, 32, 32]) == (10, 10, 10)
    assert read_index(out).recipe["background"] == stored


@pytest.mark.parametrize("words", [(), ("--exif",)])
def test_the_orientation_is_applied_if_asked(prepare: Prepare, tree: Path, out: Path, words: tuple[str, ...]) -> None:
    """I9: An image is turned as EXIF says only with --exif, which is recorded."""
    image_trees.write_turned(tree / "a" / "x.jpg")
    assert prepare(tree, out, *words) == ExitCode.DONE, prepare.err
    ((pixels, _),) = samples(out)
    expected = grey_ramp(255).T if words else grey_ramp(255)
    assert np.abs(pixels.astype(int) - expected).max() <= 8
    assert read_index(out).recipe["exif"] is bool(words)


def test_other_reading_options_need_another_folder(prepare: Prepare, tree: Path, out: Path) -> None:
    """I9: A folder is not continued with another background or orientation rule; older folders have the defaults."""
    write_tree(tree, "a/x.png")
    assert prepare(tree, out) == ExitCode.DONE
    for words, key in ((("--background", "white"), "background"), (("--exif",), "exif")):
        assert prepare(tree, out, *words) == ExitCode.CONFIG
        assert prepare.err.count("\n") == 1 and f"was made with {key} " in prepare.err
    index = json.loads((out / "index.json").read_text())
    for key in ("background", "exif", "numeric_classes"):
        del index["recipe"][key]
    (out / "index.json").write_text(json.dumps(index))
    assert prepare(tree, out) == ExitCode.DONE, prepare.err


@pytest.mark.parametrize("colour", ["red", "1,2", "1,2,256", "-1,2,3", "a,b,c", ""])
def test_a_background_that_is_no_colour_is_refused(prepare: Prepare, tree: Path, out: Path, colour: str) -> None:
    """I9: The legal backgrounds are named."""
    line = prepare.refuses(write_tree(tree, "a/x.png"), out, f"--background={colour}", status=ExitCode.USAGE)
    assert "white, black, or R,G,B" in line


# ---- I10


def test_the_mapping_of_labels_is_printed_and_stored(prepare: Prepare, tree: Path, out: Path) -> None:
    """I10: Every label's folder is printed; numbered folders that are sorted as text are pointed out."""
    write_tree(tree, *(f"{number}/a.png" for number in range(12)))
    assert prepare(tree, out) == ExitCode.DONE
    assert "label 2: 10, 1 images" in prepare.out and "--numeric-classes" in prepare.out
    assert list(words_of(out))[:4] == ["0", "1", "10", "11"]


def test_numeric_classes_sort_by_number(prepare: Prepare, tree: Path, out: Path) -> None:
    """I10: With --numeric-classes label 2 is folder 2, and a folder with other labels is refused."""
    write_tree(tree, *(f"{number:{'03' if number % 2 else ''}}/a.png" for number in range(12)))
    assert prepare(tree, out, "--numeric-classes") == ExitCode.DONE, prepare.err
    assert [int(name) for name in words_of(out)] == list(range(12)) and "label 2: 2, " in prepare.out
    assert "--numeric-classes" not in prepare.out
    for pixels, label in samples(out):
        path = next(path for path in tree.glob("*/a.png") if int(path.parent.name) == label)
        assert np.array_equal(pixels, np.asarray(Image.open(path)).transpose(2, 0, 1))
    assert prepare(tree, out) == ExitCode.CONFIG and "other labels" in prepare.err


def test_numeric_classes_need_numbers(prepare: Prepare, tree: Path, out: Path) -> None:
    """I10: A class folder that is no number is named."""
    write_tree(tree, "1/a.png", "two/a.png")
    assert "class folder 'two'" in prepare.refuses(tree, out, "--numeric-classes", status=ExitCode.CONFIG)


def test_a_long_mapping_is_shortened(prepare: Prepare, tree: Path, out: Path) -> None:
    """I10: Of many classes the first and last are printed, and index.json holds all."""
    write_tree(tree, *(f"c{number:03}/a.png" for number in range(120)))
    assert prepare(tree, out) == ExitCode.DONE
    assert "label 0: c000" in prepare.out and "label 119: c119" in prepare.out and len(prepare.out.splitlines()) < 40


# ---- I11


NAMES = tuple(f"{name}/{number}.png" for name in "ab" for number in range(5))


def grow(tree: Path, *names: str) -> None:
    for number, name in enumerate(names):
        write_image(tree / name, 100 + number)


def test_changed_images_are_counted_and_named(prepare: Prepare, tree: Path, out: Path) -> None:
    """I11: The same command on a changed tree says how many images were added, are gone and changed."""
    write_tree(tree, *NAMES)
    assert prepare(tree, out) == ExitCode.DONE
    before = shards(out)
    grow(tree, "a/new.png", "b/new.png")
    assert prepare(tree, out) == ExitCode.CONFIG
    assert prepare.err.count("\n") == 1 and "2 added (a/new.png, ...), 0 gone, 0 changed" in prepare.err
    assert "--add-images" in prepare.err
    (tree / "a" / "0.png").unlink()
    write_image(tree / "b" / "1.png", 77)
    for words in ((), ("--add-images",)):
        assert prepare(tree, out, *words) == ExitCode.CONFIG
        assert "2 added (a/new.png, ...), 1 gone (a/0.png), 1 changed (b/1.png)" in prepare.err
        assert re.search(r"[0-9a-f]{64}", prepare.err) is None
    assert shards(out) == before and verify(out)[1] == []


def test_images_written_anew_with_the_same_size_are_pointed_out(
    prepare: Prepare, tree: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """I11: An image of the same size in bytes and another time is named, because it may hold other pixels."""
    write_tree(tree, *NAMES)
    assert prepare(tree, out) == ExitCode.DONE
    os.utime(tree / "a" / "3.png", (1, 1))
    assert prepare(tree, out) == ExitCode.DONE, prepare.err
    assert len(caplog.messages) == 1 and "(a/3.png)" in caplog.messages[0] and "another time" in caplog.messages[0]


@pytest.mark.parametrize("per_shard", [4, 10, 1024])
def test_added_images_come_in_new_shards(prepare: Prepare, tree: Path, out: Path, per_shard: int) -> None:
    """I11: --add-images appends the new images; the old shards stay, and the same command then keeps all."""
    write_tree(tree, *NAMES)
    words = ("--samples-per-shard", per_shard)
    assert prepare(tree, out, *words) == ExitCode.DONE
    before = shards(out)
    for count, names in ((12, ("a/new.png", "b/new.png")), (15, ("c/0.png", "c/1.png", "a/last.png"))):
        grow(tree, *names)
        assert prepare(tree, out, *words, "--add-images") == ExitCode.DONE, prepare.err
        assert before.items() <= shards(out).items()
        assert len(samples(out)) == count and verify(out)[1] == []
        before = shards(out)
        for again in ((), ("--add-images",)):
            assert prepare(tree, out, *words, *again) == ExitCode.DONE, prepare.err
            assert "0 shards written" in prepare.out and shards(out) == before
    assert words_of(out) == {"a": 0, "b": 1, "c": 2}
    stored = {(pixels.tobytes(), label) for pixels, label in samples(out)}
    for path in tree.rglob("*.png"):
        assert (np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes(), "abc".index(path.parent.name)) in stored


def test_an_addition_that_was_stopped_continues(prepare: Prepare, tree: Path, out: Path, tmp_path: Path) -> None:
    """I11: An interrupted addition leaves the folder usable, and repeating it gives the same bytes."""
    write_tree(tree, *NAMES)
    words = ("--samples-per-shard", 2)
    assert prepare(tree, out, *words) == ExitCode.DONE
    index = (out / "index.json").read_bytes()
    grow(tree, *(f"a/new{number}.png" for number in range(6)))
    shutil.copytree(out, tmp_path / "undisturbed")
    assert prepare(tree, tmp_path / "undisturbed", *words, "--add-images") == ExitCode.DONE
    good = {path: path.read_bytes() for path in tree.rglob("a/new*.png")}
    for path in sorted(good)[:1]:
        path.write_bytes(b"x" * len(good[path]))
    assert prepare(tree, out, *words, "--add-images") == ExitCode.DATA
    assert (out / "index.json").read_bytes() == index and verify(out)[1] == []
    for path, data in good.items():
        path.write_bytes(data)
    assert prepare(tree, out, *words) == ExitCode.DONE, prepare.err
    assert shards(out) == shards(tmp_path / "undisturbed")
    assert read_index(out) == read_index(tmp_path / "undisturbed")


def test_a_new_class_may_not_change_the_labels_of_others(prepare: Prepare, tree: Path, out: Path) -> None:
    """I11: A new class that sorts before others is refused, because their labels would change."""
    write_tree(tree, *NAMES)
    assert prepare(tree, out) == ExitCode.DONE
    grow(tree, "aa/new.png")
    for words in ((), ("--add-images",)):
        assert prepare(tree, out, *words) == ExitCode.CONFIG
        assert prepare.err.count("\n") == 1 and "new classes (aa) would change the labels" in prepare.err


def test_folders_of_earlier_versions_are_continued_and_compared(prepare: Prepare, tree: Path, out: Path) -> None:
    """I11: A folder without a list of images is kept if the images are the same, and its additions are counted."""
    write_tree(tree, *NAMES)
    assert prepare(tree, out) == ExitCode.DONE
    (out / "images.jsonl").unlink(missing_ok=True)
    assert prepare(tree, out) == ExitCode.DONE and "1 kept" in prepare.out
    (out / "images.jsonl").unlink()
    grow(tree, "a/new.bmp")
    assert prepare(tree, out) == ExitCode.CONFIG and "1 added (a/new.bmp)" in prepare.err
    grow(tree, "a/new.png")
    assert prepare(tree, out) == ExitCode.CONFIG
    assert prepare.err.count("\n") == 1 and "from other images than this command reads" in prepare.err
    assert re.search(r"[0-9a-f]{64}", prepare.err) is None


def test_earlier_versions_read_the_index(prepare: Prepare, tree: Path, out: Path) -> None:
    """I11: index.json has the fields that earlier versions know, and no others outside the recipe."""
    assert prepare(write_tree(tree, *NAMES), out, "--exif") == ExitCode.DONE
    index = json.loads((out / "index.json").read_text())
    assert set(index) == {"version", "facts", "recipe", "shards"} and index["version"] == 1
    known = {"kind", "total", "channels", "size", "classes", "class_names", "mirrored", "latent_scale"}
    assert set(index["facts"]) == known


@pytest.mark.parametrize(
    "text", [b"", b"{}\n", b"[1]\n", b'{"version": 1, "classes": [], "batches": [2]}\n["a", 0]\n', b"\xff\n"]
)
def test_a_damaged_list_of_images_is_named(prepare: Prepare, tree: Path, out: Path, text: bytes) -> None:
    """I11: A list of images that cannot be read is refused in one line that says what to do."""
    assert prepare(write_tree(tree, *NAMES), out) == ExitCode.DONE
    (out / "images.jsonl").write_bytes(text)
    assert prepare(tree, out) == ExitCode.CONFIG
    assert prepare.err.count("\n") == 1 and f"{out}/images.jsonl cannot be read; delete it" in prepare.err
