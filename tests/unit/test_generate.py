"""Drawn images are functions of weights, label, seed and index; drawn digits are judged fairly."""

from __future__ import annotations

import numpy as np
import pytest
from written_run import tiny_config, write_run

from sdit.checkpoint.load import Trained, load_trained
from sdit.data.digits import digits
from sdit.evaluate.digits import judge_digits, within_class_spread
from sdit.evaluate.generate import Generator

LABELS = np.array([0, 1, 2, 3, 4, 0, 1], dtype=np.int64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, tiny_config())
    return load_trained(folder)


def draw(trained: Trained, labels: np.ndarray = LABELS, batch: int = 64, **settings: object) -> np.ndarray:
    chosen = trained.config.sample.model_copy(update=settings)
    return np.concatenate(list(Generator(trained, chosen, batch=batch).images(labels)))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++2m"])
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_images_do_not_depend_on_the_batch(trained: Trained, sampler: str, batch: int) -> None:
    expected = draw(trained, sampler=sampler)
    assert expected.shape == (7, 1, 4, 4) and expected.dtype == np.float32
    assert np.abs(draw(trained, batch=batch, sampler=sampler) - expected).max() <= 1e-5


def test_an_image_follows_from_its_own_label_seed_and_index(trained: Trained) -> None:
    images = draw(trained)
    assert np.abs(draw(trained, LABELS[:3]) - images[:3]).max() <= 1e-5
    other_label = draw(trained, np.array([0, 1, 2, 3, 0, 0, 1]))
    changed = np.abs(other_label - images).max(axis=(1, 2, 3)) > 1e-3
    assert changed.tolist() == [False] * 4 + [True] + [False] * 2
    assert np.abs(draw(trained, seed=1) - images).max(axis=(1, 2, 3)).min() > 1e-3
    assert len(np.unique(images.round(3), axis=0)) == len(images)


def test_progress_counts_all_sampler_steps(trained: Trained) -> None:
    seen: list[tuple[int, int]] = []
    settings = trained.config.sample
    generator = Generator(trained, settings, batch=3)
    list(generator.images(LABELS, progress=lambda done, steps: seen.append((done, steps))))
    assert seen == [(done, 9) for done in range(1, 10)]


def test_real_digits_pass_for_digits() -> None:
    pixels, labels = digits()
    report = judge_digits(pixels / 127.5 - 1, labels)
    assert report.good and report.spread == 1.0
    assert report.held_out <= report.recognised


@pytest.mark.parametrize("fault", ["wrong labels", "one image a class", "noise"])
def test_what_is_not_a_varied_digit_of_its_class_fails(fault: str) -> None:
    pixels, labels = digits()
    images = pixels / 127.5 - 1
    if fault == "wrong labels":
        labels = (labels + 1) % 10
    elif fault == "one image a class":
        images = images[[np.flatnonzero(labels == label)[0] for label in labels]]
    else:
        images = np.random.default_rng(0).uniform(-1, 1, images.shape)
    assert not judge_digits(images, labels).good


def test_spread_is_the_deviation_within_classes() -> None:
    rows = np.array([[0.0, 0.0], [2.0, 0.0], [10.0, 10.0], [10.0, 14.0]])
    # Two values a and b deviate by |a - b| / sqrt(2); means over two pixels of two classes.
    assert within_class_spread(rows, np.array([0, 0, 1, 1])) == pytest.approx((2 + 0 + 0 + 4) / 4 / 2**0.5)
