"""Where pictures come from: Fashion-MNIST's files and folders of images."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdit.data.digits import digits
from sdit.data.folders import folder_source
from sdit.data.image_file import center_crop, read_image
from sdit.data.sources import ImageSource, SourceImage, fashion_mnist_source, read_idx
from sdit.errors import ConfigError, DataError


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture
def fashion(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """Twelve random pictures in the format of Fashion-MNIST's training files."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", pixels)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(12, dtype=np.uint8) % 10)
    return tmp_path, pixels


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two cats, three dogs and some other files; every image has its own grey level."""
    root = tmp_path / "tree"
    for level, name in enumerate(("dog/2.png", "dog/1.jpeg", "cat/b.WEBP", "cat/deep/a.png", "dog/0.png")):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 8), (40 * level,) * 3).save(path, lossless=True, quality=100)
    (root / "dog" / "notes.txt").write_text("not an image")
    (root / "dog" / "._1.png").write_text("not an image")
    (root / "readme.png").write_text("not in a class")
    (root / ".hidden").mkdir()
    return root


def pixels_of(picture: SourceImage) -> np.ndarray:
    assert isinstance(picture.pixels, np.ndarray)
    return picture.pixels


def levels_of(source: ImageSource) -> list[tuple[int, int]]:
    return [(int(pixels_of(picture).mean().round()), picture.label) for picture in source.images()]


def cropped(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(center_crop(Image.fromarray(pixels), 8))


def test_fashion_mnist_is_read_as_written(fashion: tuple[Path, np.ndarray]) -> None:
    source = fashion_mnist_source(fashion[0], "train", pad_to=None)
    assert (source.facts.total, source.facts.size, source.facts.channels, source.facts.classes) == (12, 28, 1, 10)
    pictures = list(source.images())
    assert [picture.key for picture in pictures][:2] == ["000000000", "000000001"]
    assert [picture.label for picture in pictures] == [*range(10), 0, 1]
    assert all(np.array_equal(pixels_of(picture), fashion[1][i : i + 1]) for i, picture in enumerate(pictures))


def test_padding_adds_a_black_border_and_nothing_else(fashion: tuple[Path, np.ndarray]) -> None:
    pixels = fashion_mnist_source(fashion[0], "train", pad_to=32).pixels
    assert pixels.shape == (12, 1, 32, 32)
    assert np.array_equal(pixels[:, 0, 2:30, 2:30], fashion[1]) and pixels.sum() == fashion[1].sum()


def test_padding_to_less_is_refused(fashion: tuple[Path, np.ndarray]) -> None:
    with pytest.raises(ConfigError, match="--pad: 20 is less than the images' 28"):
        fashion_mnist_source(fashion[0], "train", pad_to=20)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "cannot be unpacked"),
        (lambda data: b"plain", "cannot be unpacked"),
        (lambda data: gzip.compress(gzip.decompress(data)[:-1]), r"holds 9407 values, its header says \(12, 28, 28\)"),
        (lambda data: gzip.compress(gzip.decompress(data) + b"x"), "holds 9409 values"),
        (lambda data: gzip.compress(b"\0\0\x09\x03" + gzip.decompress(data)[4:]), "is not an IDX file"),
        (lambda data: gzip.compress(b"\0\0"), "is not an IDX file"),
    ],
)
def test_a_wrong_idx_file_is_refused_by_name(fashion: tuple[Path, np.ndarray], damage, message: str) -> None:  # type: ignore[no-untyped-def]
    path = fashion[0] / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path, dimensions=3)
    assert str(path) in str(caught.value)


def test_missing_fashion_mnist_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz: no such file"):
        fashion_mnist_source(tmp_path, "test", pad_to=None)


def test_labels_number_the_sorted_subfolders(tree: Path) -> None:
    source = folder_source(tree, size=4, channels=3)
    assert source.facts.class_names == ("cat", "dog")
    assert sorted(levels_of(source)) == [(0, 1), (40, 1), (80, 0), (120, 0), (160, 1)]


def test_the_order_depends_on_the_names_alone(tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for path in sorted(tree.rglob("*.*"), reverse=True):
        target = copy / path.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            target.write_bytes(path.read_bytes())
    first, second = folder_source(tree, 4, 3), folder_source(copy, 4, 3)
    assert first.files == second.files and first.recipe == second.recipe


def test_every_shard_holds_all_classes(tmp_path: Path) -> None:
    for name in (f"{label}/{number:03d}.png" for label in range(2) for number in range(200)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    labels = [label for _, label in folder_source(tmp_path, 4, 3).subset(0, 100).files]
    assert abs(np.mean(labels) - 0.5) < 5 * 0.5 / np.sqrt(100)


def test_a_part_holds_the_same_images_under_the_same_keys(tree: Path) -> None:
    source = folder_source(tree, 4, 3)
    whole, part = list(source.images()), list(source.subset(1, 4).subset(1, 3).images())
    assert [picture.key for picture in part] == [picture.key for picture in whole[2:4]]
    assert all(np.array_equal(pixels_of(a), pixels_of(b)) for a, b in zip(part, whole[2:4], strict=True))


def test_a_flat_folder_is_unlabelled(tree: Path) -> None:
    source = folder_source(tree / "cat" / "deep", size=4, channels=3)
    assert source.facts.classes == 0 and levels_of(source) == [(120, 0)]


@pytest.mark.parametrize(("path", "message"), [("none", "no such folder"), ("tree/.hidden", "holds no images; legal")])
def test_a_folder_without_images_is_refused(tree: Path, tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        folder_source(tmp_path / path, 4, 3)


def test_images_become_grey_or_rgb_as_asked(tree: Path) -> None:
    assert read_image(tree / "dog/2.png", 4, channels=1).shape == (1, 4, 4)
    assert read_image(tree / "dog/2.png", 4, channels=3).shape == (3, 4, 4)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded"):
        read_image(tmp_path / "a.png", 4, 3)


def test_an_image_with_too_many_pixels_is_refused_before_decoding(tmp_path: Path) -> None:
    Image.new("1", (8193, 8192)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: 8193 x 8192 pixels; legal: up to 67108864"):
        read_image(tmp_path / "a.png", 4, 3)


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (8, 30), (31, 64), (5, 7), (1000, 9), (16, 17)])
def test_a_crop_has_the_asked_size(size: tuple[int, int]) -> None:
    assert center_crop(Image.new("RGB", size, (7, 7, 7)), 8).size == (8, 8)
    assert np.unique(cropped(np.full(size[::-1], 7, np.uint8))).tolist() == [7]


def test_a_crop_of_the_right_size_changes_nothing() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    assert np.array_equal(cropped(pixels), pixels)


def test_a_crop_keeps_the_centre() -> None:
    pixels = np.zeros((8, 24), np.uint8)
    pixels[:, 8:16] = np.arange(64).reshape(8, 8)
    assert np.array_equal(cropped(pixels), np.arange(64).reshape(8, 8))
    assert np.array_equal(cropped(pixels.T.copy()), np.arange(64).reshape(8, 8).T)


def test_halving_is_the_mean_of_two_by_two_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    expected = pixels.astype(float)
    for _ in range(2):
        expected = expected.reshape(len(expected) // 2, 2, -1, 2).mean((1, 3))
    # Both halvings round columns, then rows, each by up to a half, and a mean does not enlarge the errors it is given.
    assert np.abs(cropped(pixels) - expected).max() <= 4 * 0.5


def test_digits_are_those_that_scikit_learn_loads() -> None:
    from sklearn.datasets import load_digits

    pixels, labels = digits()
    images, targets = load_digits(return_X_y=True)
    assert np.array_equal(pixels.reshape(1797, 64), np.round(images * (255 / 16))) and pixels.dtype == np.uint8
    assert np.array_equal(labels, targets) and labels.dtype == np.int64
