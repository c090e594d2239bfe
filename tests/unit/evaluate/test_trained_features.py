"""Features learnt from the data: the same on every training, kept, told apart by their hash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sdit.data.digits import digits
from sdit.data.sources import fashion_mnist_source
from sdit.errors import ConfigError, DataError
from sdit.evaluate.classifier import TrainedFeatures, default_cache, trained_features
from sdit.evaluate.images import LabelledImages, open_images
from sdit.evaluate.metrics import frechet_distance
from sdit.evaluate.reference import reference_of
from sdit.evaluate.score import score
from sdit.evaluate.statistics import statistics_of

FASHION = Path("/usr/share/datasets/fashion-mnist")


def digit_arrays() -> tuple[np.ndarray, np.ndarray]:
    images = open_images("digits")
    assert isinstance(images, LabelledImages)
    return images.arrays()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def network(cache: Path) -> TrainedFeatures:
    return trained_features(*digit_arrays(), 10, cache=cache)


def test_digits_are_recognised(network: TrainedFeatures) -> None:
    assert network.facts["held_out_accuracy"] >= 0.95
    pixels, _ = digit_arrays()
    features, logits = network(pixels[:7])
    assert features.shape == (7, 128) and logits.shape == (7, 10) and features.dtype == logits.dtype == np.float32


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdit.evaluate.classifier.EPOCHS", 1)
    monkeypatch.setattr("sdit.evaluate.classifier.MIN_STEPS", 1)


@pytest.mark.usefixtures("few_steps")
def test_training_again_gives_the_same_weights(tmp_path: Path) -> None:
    first = trained_features(*digit_arrays(), 10, cache=tmp_path / "a")
    torch.manual_seed(99)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    assert trained_features(*digit_arrays(), 10, cache=tmp_path / "b").digest == first.digest
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("few_steps")
def test_another_seed_or_other_data_are_another_network(tmp_path: Path) -> None:
    pixels, labels = digit_arrays()
    changed = pixels.copy()
    changed[0, 0, 0] ^= 1
    variants = [(pixels, 0), (pixels, 1), (changed, 0)]
    networks = [trained_features(images, labels, 10, seed, tmp_path) for images, seed in variants]
    assert len({network.digest for network in networks}) == len(list(tmp_path.glob("*.safetensors"))) == 3


def test_a_trained_network_is_read_not_trained(network: TrainedFeatures, cache: Path) -> None:
    steps: list[tuple[int, int]] = []
    again = trained_features(*digit_arrays(), 10, cache=cache, progress=lambda *step: steps.append(step))
    assert not steps and again.facts == network.facts
    pixels, _ = digit_arrays()
    assert np.array_equal(again(pixels)[0], network(pixels)[0])


def test_a_damaged_cache_is_told(network: TrainedFeatures, tmp_path: Path, cache: Path) -> None:
    for path in cache.glob("*.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="delete it"):
        trained_features(*digit_arrays(), 10, cache=tmp_path)


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache() == Path("/somewhere/sdit/features")


@pytest.mark.parametrize(
    ("size", "classes", "message"),
    [(28, 10, "28 x 28 pixels cannot be learnt"), (128, 10, "128 x 128"), (8, 1, "2 classes or more"), (8, 5, "0..4")],
)
def test_what_cannot_be_learnt_is_refused(size: int, classes: int, message: str, tmp_path: Path) -> None:
    pixels = np.zeros((40, size, size, 1), dtype=np.uint8)
    with pytest.raises(ConfigError, match=message):
        trained_features(pixels, np.arange(40) % 10, classes, cache=tmp_path)


def test_images_of_another_size_are_refused(network: TrainedFeatures) -> None:
    with pytest.raises(ConfigError, match=r"trained on images of shape \(8, 8, 1\)"):
        score([np.zeros((4, 16, 16, 1), np.uint8)], reference_of([digit_arrays()[0]], network, "digits"), network)


def test_scores_of_digits_fall_as_noise_rises(network: TrainedFeatures) -> None:
    pixels = digit_arrays()[0][:500]
    reference = reference_of([pixels], network, "digits")
    noise = np.random.default_rng(0).normal(size=pixels.shape)
    levels = [np.clip(pixels + level * noise, 0, 255).astype(np.uint8) for level in (0, 8, 16, 32, 64)]
    scores = [score([images], reference, network) for images in levels]
    assert abs(scores[0]["fid"]) <= 1e-9 * np.trace(reference.statistics.covariance)
    assert scores[0]["precision"] == scores[0]["recall"] == 1
    assert (np.diff([each["fid"] for each in scores]) > 0).all()
    assert scores[-1]["kid"] > scores[1]["kid"] and scores[-1]["recall"] < scores[1]["recall"]
    assert scores[-1]["inception_score"] < scores[0]["inception_score"] <= 10


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_is_recognised_and_its_training_set_has_no_distance_to_itself(tmp_path: Path) -> None:
    sources = [fashion_mnist_source(FASHION, split, 32) for split in ("train", "test")]
    (train, labels), (test, truth) = [(source.pixels.transpose(0, 2, 3, 1), source.labels) for source in sources]
    network = trained_features(train, labels, 10, cache=tmp_path)
    answers = [network(part)[1].argmax(axis=1) for part in np.array_split(test, 10)]
    assert (np.concatenate(answers) == truth).mean() >= 0.9
    real = statistics_of(np.array_split(train, 60), network)

    def fid(images: np.ndarray) -> float:
        found = statistics_of([images], network)
        return frechet_distance(found.mean, found.covariance, real.mean, real.covariance)

    assert abs(fid(train)) <= 1e-9 * np.trace(real.covariance)
    assert 0 < fid(test) < 1
    noise = np.random.default_rng(0).normal(size=test.shape)
    noisy = [np.clip(test + level * noise, 0, 255).astype(np.uint8) for level in (0, 2, 4, 8, 16)]
    assert (np.diff([fid(images) for images in noisy]) > 0).all()


def test_digits_are_what_scikit_learn_holds() -> None:
    pixels, labels = digit_arrays()
    expected, truth = digits()
    assert np.array_equal(pixels[..., 0], expected[:, 0]) and np.array_equal(labels, truth)
