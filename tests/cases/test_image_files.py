"""Evaluation of what others made: folders of image files, statistics files, and few images (R8, R9)."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sdit import cli
from sdit.evaluate.images import open_images
from tests.unit.written_run import tiny_config, write_run

GREY = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
RGB = np.random.default_rng(1).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)


class Averages(nn.Module):
    """Stands in for the Inception file: 12 features."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(12, 4)

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        features = nn.functional.adaptive_avg_pool2d(img.to(torch.float32), [2, 2]).flatten(1) / 128.0
        return features if return_features else self.output(features)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "net.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.jit.script(Averages()).save(str(path))
    return path


@pytest.fixture
def evaluate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, net: Path
) -> Callable[..., SimpleNamespace]:
    """`sdit evaluate WORDS` with the stand-in's features, in an empty folder."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sdit.distributed.comm.set_threads", lambda *_: 1)
    monkeypatch.setattr("sdit.evaluate.metrics.KID_SUBSETS", 2)
    monkeypatch.chdir(tmp_path)

    def run(words: str, features: str | None = None) -> SimpleNamespace:
        chosen = ["--features", features or str(net)] if features != "trained" else []
        try:
            status = cli.run(["evaluate", *words.split(), *chosen])
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        result = json.loads(Path("out.json").read_text()) if status == 0 and "--out" in words else {}
        return SimpleNamespace(status=status, out=out, lines=out.splitlines(), err=err, result=result)

    return run


def write_images(folder: Path, pixels: np.ndarray, classes: int = 0, ending: str = "png") -> Path:
    for number, each in enumerate(pixels):
        path = folder / (f"class{number % classes}" if classes else "") / f"{number:03d}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(each).save(path)
    return folder


def numbers(result: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in result.items() if not isinstance(value, dict)}


# R8


def test_scores_of_few_images_are_marked(evaluate: Any) -> None:
    """R8: A FID of 12 images is not printed like one of 50,000: stdout and JSON say that it is biased, and why."""
    np.savez("a.npz", arr_0=RGB)
    done = evaluate("--samples a.npz --reference a.npz --out out.json")
    assert done.status == 0
    words = done.lines[0].split()
    assert all(value.endswith("*") for value in words[1::2]), done.lines
    assert "* depends on the number of images" in done.out and "fewer than 10000" in done.out
    biased = done.result["biased"]
    assert biased["fid"] == "12 drawn and 12 reference images, fewer than 10000"
    assert biased["kid"].endswith("fewer than 1000") and set(biased) == set(words[::2])


@pytest.mark.parametrize(
    ("drawn", "reference", "expected"),
    [
        (9_999, 50_000, {"fid", "inception_score", "precision", "recall"}),
        (10_000, 9_999, {"fid", "precision", "recall"}),
        (10_000, 10_000, set()),
        (50_000, None, set()),
        (999, None, {"fid", "inception_score"}),
    ],
)
def test_each_score_has_its_own_need(
    drawn: int, reference: int | None, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """R8: FID, Inception score, precision and recall need 10,000 images, KID 1,000, of every set that they use."""
    from sdit.evaluate.reference import Reference
    from sdit.evaluate.score import score_statistics
    from sdit.evaluate.statistics import KEPT_FEATURES, FeatureStatistics

    monkeypatch.setattr("sdit.evaluate.metrics.KID_SUBSETS", 1)
    monkeypatch.setattr("sdit.evaluate.metrics.precision_recall", lambda *_: (1.0, 1.0))  # distances of all pairs

    def statistics(count: int | None) -> FeatureStatistics:
        rows = None if count is None else np.random.default_rng(0).normal(size=(count, 2)).astype(np.float32)
        kept = None if rows is None else rows[:KEPT_FEATURES]
        return FeatureStatistics(count, np.zeros(2), np.eye(2), kept, kept, None)

    scores = score_statistics(statistics(drawn), Reference("x", statistics(reference), None), 0)
    assert set(scores.get("biased", ["not said"])) == expected


# R9


@pytest.mark.parametrize("classes", [0, 3])
def test_a_folder_of_images_scores_as_their_npz(evaluate: Any, classes: int) -> None:
    """R9: `--samples FOLDER` of PNG files, flat or with class folders, gives the scores of the same pixels."""
    order = sorted(range(len(RGB)), key=lambda number: (number % classes if classes else 0, number))
    write_images(Path("png"), RGB, classes)
    np.savez("same.npz", arr_0=RGB[order])
    np.savez("real.npz", arr_0=255 - RGB)
    folder = evaluate("--samples png --reference real.npz --out out.json")
    npz = evaluate("--samples same.npz --reference real.npz --out out.json")
    assert (folder.status, npz.status) == (0, 0), (folder, npz)
    assert numbers(folder.result) == numbers(npz.result)
    assert folder.result["images"] == npz.result["images"]
    assert folder.result["drawn"]["folder"] == "png" and folder.result["drawn"]["files"] == 12
    assert folder.result["drawn"]["shape"] == [8, 8, 3]


def test_a_tree_as_reference_is_cropped_to_the_samples(evaluate: Any) -> None:
    """R9: `--reference IMAGE_TREE` is prepared as `prepare folder` does, to the size of the samples; the result says so."""
    from sdit.data.image_file import read_image

    rng = np.random.default_rng(2)
    for number, shape in enumerate([(40, 20, 3), (8, 8, 3), (9, 30, 3), (16, 16, 3), (64, 17, 3)]):
        write_images(Path("tree") / f"n{number % 2}" / str(number), rng.integers(0, 256, (1, *shape), dtype=np.uint8))
    files = sorted(Path("tree").rglob("*.png"))
    np.savez("real.npz", arr_0=np.stack([read_image(path, 8, 3).transpose(1, 2, 0) for path in files]))
    np.savez("a.npz", arr_0=RGB)
    tree = evaluate("--samples a.npz --reference tree --out out.json")
    npz = evaluate("--samples a.npz --reference real.npz --out out.json")
    assert tree.status == 0, tree
    assert numbers(tree.result) == numbers(npz.result)
    assert tree.result["reference"]["sha256"] == npz.result["reference"]["sha256"]
    assert tree.result["reference_files"]["shape"] == [8, 8, 3] and "ADM" in tree.result["reference_files"]["crop"]


def test_both_may_be_trees_and_statistics_are_saved(evaluate: Any) -> None:
    """R9: Two folders; and a tree alone, whose statistics are saved."""
    write_images(Path("a"), RGB)
    write_images(Path("b"), 255 - RGB, 2)
    done = evaluate("--samples a --reference b --out out.json --save-reference b.npz")
    again = evaluate("--samples a --reference b.npz --out out.json")
    assert (done.status, again.status) == (0, 0) and numbers(done.result) == numbers(again.result)
    assert evaluate("--reference b --save-reference c.npz").status == 0
    with np.load("b.npz") as one, np.load("c.npz") as other:
        assert np.array_equal(one["sigma"], other["sigma"])


def test_features_are_learnt_from_a_tree(evaluate: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """R9: A tree with class folders serves for trained features, for files and for a run."""
    monkeypatch.setattr("sdit.evaluate.classifier.MIN_STEPS", 2)
    write_images(Path("tree"), np.concatenate([GREY] * 4), 3)
    write_images(Path("png"), GREY)
    words = f"--reference tree --out out.json --cache {tmp_path}/cache"
    done = evaluate(f"--samples png {words}", "trained")
    assert done.status == 0 and done.result["features"]["recipe"]["shape"] == [8, 8, 1], done
    write_run(tmp_path / "run", tiny_config("model.input_size=8", "model.classes=3"))
    done = evaluate(f"--checkpoint run --images 6 --steps 1 {words}", "trained")
    assert done.status == 0 and done.result["reference_files"]["files"] == 48, done
    write_images(Path("flat"), GREY)
    done = evaluate(f"--samples png --reference flat --out out.json --cache {tmp_path}/cache", "trained")
    assert done.status == 78 and "one folder of images for each class" in done.err


def test_grey_images_stored_as_rgb(evaluate: Any) -> None:
    """R9: torchvision's save_image stores grey pictures as RGB; colours against a grey reference are refused."""
    np.savez("real.npz", arr_0=255 - GREY[..., None])
    write_images(Path("grey"), GREY)
    write_images(Path("stored"), np.repeat(GREY[..., None], 3, axis=3))
    write_images(Path("coloured"), RGB)
    grey = evaluate("--samples grey --reference real.npz --out out.json")
    stored = evaluate("--samples stored --reference real.npz --out out.json")
    assert (grey.status, stored.status) == (0, 0) and numbers(grey.result) == numbers(stored.result)
    refused = evaluate("--samples coloured --reference real.npz --out x.json")
    assert refused.status == 65 and "000.png: has colours" in refused.err and not Path("x.json").exists()


def test_samples_of_several_sizes_are_refused_or_cropped_on_demand(evaluate: Any) -> None:
    """R9: Images to score are not resized in silence."""
    write_images(Path("png"), RGB[:6])
    Image.new("RGB", (9, 8)).save("png/wide.png")
    np.savez("real.npz", arr_0=RGB)
    refused = evaluate("--samples png --reference real.npz --out out.json")
    assert refused.status == 65 and refused.err.count("\n") == 1
    assert "8 x 8 (000.png), 9 x 8 (wide.png)" in refused.err and "--size N" in refused.err
    done = evaluate("--samples png --size 8 --reference real.npz --out out.json")
    assert done.status == 0 and done.result["images"]["count"] == 7
    wrong = evaluate("--samples png --size 16 --reference real.npz --out x.json")
    assert wrong.status == 78 and "(16, 16, 3)" in wrong.err


def damage(folder: Path) -> None:
    whole = (folder / "000.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("x")
    (folder / "LICENSE").write_text("x")
    (folder / ".hidden.png").write_text("x")


@pytest.mark.parametrize("role", ["samples", "reference"])
def test_damaged_files_are_named_or_counted(evaluate: Any, role: str) -> None:
    """R9: A bad file ends the evaluation with its name; --skip-bad leaves it out and counts it."""
    write_images(Path("png"), RGB, 2 if role == "reference" else 0)
    damage_folder = Path("png/class0") if role == "reference" else Path("png")
    damage(damage_folder)
    np.savez("real.npz", arr_0=RGB)
    other = {"samples": "reference", "reference": "samples"}[role]
    words = f"--{role} png --{other} real.npz --out out.json"
    refused = evaluate(words)
    assert refused.status == 65 and refused.err.count("\n") == 1 and "--skip-bad" in refused.err, refused
    assert any(name in refused.err for name in ("cut.png", "text.png", "empty.jpg"))
    done = evaluate(f"{words} --skip-bad")
    assert done.status == 0, done
    facts = done.result["drawn" if role == "samples" else "reference_files"]
    assert facts["bad"]["count"] == 3 and facts["other_files"] == {".txt": 1, "LICENSE": 1, "hidden": 1}
    assert (
        done.result["images" if role == "samples" else "reference"]["images" if role == "reference" else "count"] == 12
    )
    assert "left out 3 of 15 images" in done.out and "1 .txt" in done.out and "1 LICENSE" in done.out


@pytest.mark.parametrize("role", ["samples", "reference"])
def test_folders_without_images_are_refused(evaluate: Any, role: str) -> None:
    """R9: An empty folder, one of other files, and a path that is nothing: one line each."""
    np.savez("real.npz", arr_0=RGB)
    Path("empty").mkdir()
    Path("texts/a").mkdir(parents=True)
    Path("texts/a/x.txt").write_text("x")
    Path("a.npy").write_bytes(b"x")
    other = {"samples": "reference", "reference": "samples"}[role]
    for path, message in {
        "empty": "empty: holds no images", "texts": "texts: holds no images", "none": "none: no such file or folder",
        "a.npy": "a.npy: is no npz",
    }.items():  # fmt: skip
        done = evaluate(f"--{role} {path} --{other} real.npz --out out.json")
        assert done.status == 65 and message in done.err and done.err.count("\n") == 1, done


def moments(features: int, **more: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, features))
    return {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False), **more}


STATISTICS: dict[str, tuple[dict[str, np.ndarray], int, str]] = {
    "pytorch-fid": (moments(12), 0, ""),
    "single precision": ({key: value.astype(np.float32) for key, value in moments(12).items()}, 0, ""),
    "ADM": (moments(12, arr_0=RGB, mu_s=np.zeros(7), sigma_s=np.eye(7)), 0, ""),
    "ADM images": ({"arr_0": RGB, "arr_1": np.arange(12)}, 0, ""),
    "other features": (moments(9), 78, "holds 9 features, not 12"),
    "not square": ({"mu": np.zeros(12), "sigma": np.eye(11)}, 65, "legal: (D,) and (D, D)"),
    "not finite": ({"mu": np.full(12, np.nan), "sigma": np.eye(12)}, 65, "not finite"),
    "not symmetric": ({"mu": np.zeros(12), "sigma": np.triu(np.ones((12, 12)))}, 65, "not symmetric"),
    "objects": ({"mu": np.array([None] * 12), "sigma": np.eye(12)}, 65, "cannot be read as npz"),
    "neither": ({"mu": np.zeros(12)}, 65, "holds no arr_0"),
}


@pytest.mark.parametrize("source", ["npz", "folder", "run"])
@pytest.mark.parametrize("kind", STATISTICS)
def test_statistics_files_are_read_or_refused_first(evaluate: Any, tmp_path: Path, kind: str, source: str) -> None:
    """R9: mu and sigma as pytorch-fid and ADM write them; what does not fit is refused in one line, before drawing."""
    arrays, status, message = STATISTICS[kind]
    np.savez_compressed("real.npz", **arrays)
    np.savez("a.npz", arr_0=RGB)
    write_images(Path("png"), RGB)
    write_run(tmp_path / "run", tiny_config("model.input_size=8", "model.channels=3"))
    words = {"npz": "--samples a.npz", "folder": "--samples png", "run": "--checkpoint run --images 5 --steps 1"}
    done = evaluate(f"{words[source]} --reference real.npz --out out.json")
    assert done.status == status and message in done.err, done
    if status:
        assert done.err.count("\n") == 1 and not Path("out.parts").exists()


def test_features_that_do_not_fit_are_refused_before_drawing(evaluate: Any, tmp_path: Path) -> None:
    """R9: A broken feature file and statistics of other trained features do not cost the drawing."""
    write_run(tmp_path / "run", tiny_config("model.input_size=8", "model.classes=10"))
    Path("broken.pt").write_bytes(b"x")
    words = "--checkpoint run --images 5 --steps 1 --out out.json"
    done = evaluate(f"{words} --reference digits", "broken.pt")
    assert done.status == 78 and "broken.pt" in done.err and not Path("out.parts").exists()
    np.savez("real.npz", **moments(12))
    done = evaluate(f"{words} --reference real.npz --train-on digits", "trained")
    assert done.status == 78 and "holds 12 features, not 128" in done.err and not Path("out.parts").exists()


def test_a_damaged_compressed_npz_is_one_line(evaluate: Any) -> None:
    """R9: zlib's error is a data error."""
    np.savez_compressed("a.npz", arr_0=np.zeros((50, 8, 8, 3), np.uint8) + RGB[0])
    content = bytearray(Path("a.npz").read_bytes())
    with zipfile.ZipFile("a.npz") as archive:
        start = archive.getinfo("arr_0.npy").header_offset + 60
    content[start : start + 40] = bytes(40)
    Path("a.npz").write_bytes(content)
    done = evaluate("--samples a.npz --reference digits --out out.json")
    assert done.status == 65 and "a.npz" in done.err and done.err.count("\n") == 1, done


def test_a_folder_may_end_in_npz(evaluate: Any) -> None:
    """R9: What a path is decides, not its name."""
    write_images(Path("odd.npz"), RGB)
    assert evaluate("--samples odd.npz --reference odd.npz --out out.json").status == 0
    assert open_images("odd.npz") is not None
