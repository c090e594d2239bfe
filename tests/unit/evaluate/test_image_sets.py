"""Images from files: read piece by piece, written as numpy reads them, refused in one line."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from sdit.errors import ConfigError, DataError
from sdit.evaluate.images import BATCH, LabelledImages, NpzImages, open_images, write_npz

IMAGES = np.random.default_rng(0).integers(0, 256, (BATCH + 7, 3, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_read_in_pieces(save: object, tmp_path: Path) -> None:
    save(tmp_path / "x.npz", arr_0=IMAGES, arr_1=np.zeros(len(IMAGES)))  # type: ignore[operator]
    images = open_images(str(tmp_path / "x.npz"))
    assert (images.count, images.shape) == (len(IMAGES), (3, 4, 3))
    batches = list(images.batches())
    assert [len(batch) for batch in batches] == [BATCH, 7] and np.array_equal(np.concatenate(batches), IMAGES)


def test_a_written_npz_is_read_by_numpy(tmp_path: Path) -> None:
    labels = np.arange(len(IMAGES), dtype=np.int64)
    write_npz(tmp_path / "x.npz", iter(np.array_split(IMAGES, 3)), (3, 4, 3), labels)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as stored:
        assert stored["arr_0"].dtype == np.uint8 and np.array_equal(stored["arr_0"], IMAGES)
        assert np.array_equal(stored["arr_1"], labels)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, "holds no arr_0"),
        ({"arr_0": IMAGES / 255}, "arr_0 is float64"),
        ({"arr_0": IMAGES[0]}, r"uint8 \(3, 4, 3\)"),
        ({"arr_0": np.zeros((2, 3, 4, 2), np.uint8)}, "legal: uint8"),
        ({"arr_0": np.asfortranarray(IMAGES)}, "Fortran"),
        ({"arr_0": np.array([{}], dtype=object)}, "arr_0 is object"),
    ],
)
def test_other_arrays_are_refused(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        NpzImages(tmp_path / "x.npz")


def test_damage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with pytest.raises(DataError, match="no such file"):
        NpzImages(path)
    path.write_bytes(b"not an archive")
    with pytest.raises(DataError, match="cannot be read as npz"):
        NpzImages(path)
    np.savez(path, arr_0=IMAGES)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="Bad CRC-32"):
        list(NpzImages(path).batches())
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (9, 3, 4, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(IMAGES[:8].tobytes())
    with pytest.raises(DataError, match="ends before its 9 images"):
        list(NpzImages(path).batches())


def test_a_prepared_folder_holds_the_images_it_was_made_of(tmp_path: Path) -> None:
    from sdit.cli.prepare import main

    assert main(["digits", "--out", str(tmp_path / "digits"), "--samples-per-shard", "700"]) == 0
    folder, embedded = open_images(str(tmp_path / "digits")), open_images("digits")
    assert isinstance(folder, LabelledImages) and isinstance(embedded, LabelledImages)
    assert (folder.count, folder.shape, folder.classes) == (1797, (8, 8, 1), 10)
    for ours, theirs in zip(folder.arrays(), embedded.arrays(), strict=True):
        assert np.array_equal(ours, theirs)


def test_latents_are_no_images(tmp_path: Path) -> None:
    from sdit.data.index import DatasetFacts

    class Latents:
        facts = DatasetFacts(kind="latents", total=1, channels=4, size=4, classes=0)
        counts = (1,)

        def open(self, shard: int) -> object:
            raise AssertionError

    with pytest.raises(ConfigError, match="holds latents"):
        LabelledImages("x", Latents())  # type: ignore[arg-type]
