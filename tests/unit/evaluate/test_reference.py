"""Reference statistics as files: the same scores from the file as from the images, and only with the same network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdit.errors import ConfigError, DataError
from sdit.evaluate.reference import ReferenceSource, reference_of, save_reference
from sdit.evaluate.score import score


class Projection:
    """Features are 6 random projections of the pixels, logits the first three of them."""

    def __init__(self, seed: int = 0) -> None:
        self._matrix = np.random.default_rng(seed).normal(size=(16, 6)) / 100
        self.digest = f"projection {seed}"
        self.facts: dict[str, Any] = {"sha256": self.digest}

    def check(self, shape: tuple[int, int, int]) -> None:
        pass

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features = (images.reshape(len(images), -1) @ self._matrix).astype(np.float32)
        return features, features[:, :3]


def pictures(seed: int, count: int = 80) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200 + 20 * seed, (count, 4, 4, 1), dtype=np.uint8)


def scores(result: dict[str, Any]) -> dict[str, float | None]:
    return {key: value for key, value in result.items() if not isinstance(value, dict)}


def test_a_saved_reference_gives_the_same_scores(tmp_path: Path) -> None:
    network = Projection()
    reference = reference_of([pictures(0)], network, "zero")
    save_reference(tmp_path / "zero.npz", reference)
    source = ReferenceSource(str(tmp_path / "zero.npz"))
    assert source.images is None and source.shape is None
    expected = score([pictures(1)], reference, network)
    assert score([pictures(1)], source.load(network), network) == expected
    assert expected["reference"] == {
        "name": "zero",
        "images": 80,
        "sha256": reference.statistics.images,
        "compared": 80,
    }
    with pytest.raises(ConfigError, match="was made with features projection 0"):
        source.load(Projection(1))
    with pytest.raises(ConfigError, match="was made with features projection 0"):
        score([pictures(1)], reference, Projection(1))


def test_moments_alone_allow_fid_and_inception_score(tmp_path: Path) -> None:
    network = Projection()
    reference = reference_of([pictures(0)], network, "zero").statistics
    np.savez(tmp_path / "fid.npz", mu=reference.mean, sigma=reference.covariance)  # as pytorch-fid writes it
    result = score([pictures(1)], ReferenceSource(str(tmp_path / "fid.npz")).load(network), network)
    full = score([pictures(1)], reference_of([pictures(0)], network, "zero"), network)
    assert result["fid"] == full["fid"] and result["inception_score"] == full["inception_score"]
    assert result["kid"] is result["precision"] is result["recall"] is result["reference"]["images"] is None


def test_moments_beside_images_count_for_fid_alone(tmp_path: Path) -> None:
    network = Projection()
    whole, part = reference_of([pictures(0)], network, "whole"), pictures(0)[:30]
    statistics = whole.statistics
    np.savez(tmp_path / "adm.npz", mu=statistics.mean, sigma=statistics.covariance, arr_0=part)  # as ADM's batches
    source = ReferenceSource(str(tmp_path / "adm.npz"))
    assert source.shape == (4, 4, 1)
    result = score([pictures(1)], source.load(network), network)
    few = score([pictures(1)], reference_of([part], network, "part"), network)
    assert result["fid"] == score([pictures(1)], whole, network)["fid"] != few["fid"]
    assert [result[key] for key in ("kid", "precision", "recall")] == [
        few[key] for key in ("kid", "precision", "recall")
    ]
    assert result["reference"]["compared"] == 30


def test_an_npz_of_images_is_a_reference(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=pictures(0))
    seen: list[int] = []
    reference = ReferenceSource(str(tmp_path / "x.npz")).load(Projection(), seen.append)
    expected = score([pictures(1)], reference_of([pictures(0)], Projection(), "x"), Projection())
    assert scores(score([pictures(1)], reference, Projection())) == scores(expected) and seen == [80]


def test_statistics_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ConfigError, match="holds 5 features, not 6"):
        score([pictures(1)], ReferenceSource(str(tmp_path / "narrow.npz")).load(Projection()), Projection())
    np.savez(tmp_path / "bad.npz", mu=np.zeros(5), sigma=np.eye(4))
    with pytest.raises(DataError, match=r"mu \(5,\) and sigma \(4, 4\)"):
        ReferenceSource(str(tmp_path / "bad.npz"))


def test_scores_do_not_depend_on_batches_but_on_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdit.evaluate.metrics.KID_SUBSET_SIZE", 60)
    network = Projection()
    reference = reference_of([pictures(0, 150)], network, "zero")
    images = pictures(1, 140)
    result = score([images], reference, network)
    again = score(np.array_split(images, 9), reference, network)
    assert again["images"] == result["images"] and scores(again) == pytest.approx(scores(result))
    other = score([images], reference, network, seed=1)
    assert other["fid"] == result["fid"] and other["kid"] != result["kid"]
