"""Every metric against an implementation that shares nothing with it: numpy and scipy, float64, straight from the papers."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.spatial.distance import cdist
from scipy.special import rel_entr, softmax
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from sdit.evaluate import metrics
from sdit.evaluate.metrics import frechet_distance, inception_score, kernel_distance, precision_recall

SIZES = [(400, 300, 24), (150, 90, 200)]  # more images than features, and fewer
RELATIVE = 1e-4


def two_sets(count: int, other: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Correlated, shifted, not Gaussian, non-negative: like features after a ReLU."""
    generator = np.random.default_rng(count)
    mix = generator.normal(size=(width, width)) / width**0.5
    real = np.maximum(generator.normal(size=(count, width)) @ mix + 0.3, 0)
    drawn = np.maximum(1.2 * generator.standard_t(8, size=(other, width)) @ mix + 0.2, 0)
    return real.astype(np.float32), drawn.astype(np.float32)


def moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wide = rows.astype(np.float64)
    return wide.mean(axis=0), np.cov(wide, rowvar=False)


@pytest.mark.parametrize("sizes", SIZES)
def test_fid_is_that_of_scipy_and_of_torchmetrics(sizes: tuple[int, int, int]) -> None:
    real, drawn = two_sets(*sizes)
    ours = frechet_distance(*moments(real), *moments(drawn))
    (mean, cov), (other_mean, other_cov) = moments(real), moments(drawn)
    eigenvalues = scipy.linalg.eigvals(cov @ other_cov)  # sums of their roots: the trace of the product's root
    trace = np.sqrt(eigenvalues.real.clip(min=0)).sum()
    assert ours == pytest.approx(((mean - other_mean) ** 2).sum() + np.trace(cov + other_cov) - 2 * trace, rel=RELATIVE)

    class Features(nn.Identity):
        num_features = sizes[2]

    peer = FrechetInceptionDistance(Features()).set_dtype(torch.float64)
    peer.update(torch.from_numpy(real).double(), real=True)
    peer.update(torch.from_numpy(drawn).double(), real=False)
    assert ours == pytest.approx(peer.compute().item(), rel=RELATIVE)


def test_fid_of_gaussians_whose_covariances_commute_is_known() -> None:
    generator = np.random.default_rng(1)
    axes = np.linalg.qr(generator.normal(size=(30, 30)))[0]
    one, two = generator.uniform(0, 3, size=(2, 30))
    one[:7] = 0  # rank-deficient
    shift = generator.normal(size=30)
    covariances = [(axes * variances) @ axes.T for variances in (one, two)]
    expected = shift @ shift + ((one**0.5 - two**0.5) ** 2).sum()
    assert frechet_distance(np.zeros(30), covariances[0], shift, covariances[1]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sizes", SIZES)
def test_fid_of_a_set_with_itself_is_zero(sizes: tuple[int, int, int]) -> None:
    mean, covariance = moments(two_sets(*sizes)[0])
    assert abs(frechet_distance(mean, covariance, mean, covariance)) <= 1e-12 * np.trace(covariance)


@pytest.mark.parametrize("sizes", SIZES)
def test_fid_rises_with_noise(sizes: tuple[int, int, int]) -> None:
    real, _ = two_sets(*sizes)
    noise = np.random.default_rng(2).normal(size=real.shape)
    distances = [frechet_distance(*moments(real), *moments(real + level * noise)) for level in (0, 0.05, 0.1, 0.2, 0.4)]
    assert (np.diff(distances) > 0).all()


def unbiased_mmd(real: np.ndarray, drawn: np.ndarray) -> float:
    """The expansion of (x y / D + 1)^3 by the binomial theorem, and the sums of all unequal pairs, one image at a time."""
    width = real.shape[1]

    def kernel(x: np.ndarray, ys: np.ndarray) -> np.ndarray:
        return sum(comb(3, power) * (ys @ x / width) ** power for power in range(4))

    def within(rows: np.ndarray) -> float:
        total = sum(kernel(rows[i], np.delete(rows, i, axis=0)).sum() for i in range(len(rows)))
        return total / (len(rows) * (len(rows) - 1))

    across = np.mean([kernel(x, drawn).mean() for x in real])
    return within(real) + within(drawn) - 2 * across


@pytest.mark.parametrize("width", [24, 200])
def test_kid_of_whole_sets_is_the_unbiased_mmd(width: int) -> None:
    real, drawn = two_sets(120, 120, width)  # no more than a subset holds: every subset is the whole set
    mean, deviation = kernel_distance(real, drawn, seed=0)
    assert mean == pytest.approx(unbiased_mmd(real.astype(np.float64), drawn.astype(np.float64)), rel=RELATIVE)
    assert deviation < 1e-9 * abs(mean)


def test_kid_of_subsets_scatters_around_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    real, drawn = two_sets(400, 300, 24)
    whole = unbiased_mmd(real.astype(np.float64), drawn.astype(np.float64))
    monkeypatch.setattr(metrics, "KID_SUBSET_SIZE", 50)
    mean, deviation = kernel_distance(real, drawn, seed=3)
    assert kernel_distance(real, drawn, seed=3) == (mean, deviation) != kernel_distance(real, drawn, seed=4)
    assert abs(mean - whole) < 4 * deviation / metrics.KID_SUBSETS**0.5


def test_the_callers_random_numbers_are_left_alone() -> None:
    real, drawn = two_sets(60, 60, 8)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    kernel_distance(real, drawn, seed=0)
    inception_score(drawn, seed=0)
    assert torch.rand(1) == expected


def test_inception_score_is_exp_of_the_mean_divergence_of_each_split() -> None:
    logits = (3 * np.random.default_rng(6).normal(size=(230, 12))).astype(np.float32)
    torch.manual_seed(7)
    order = torch.randperm(230).numpy()  # the seed decides which images share a split
    wide = softmax(logits.astype(np.float64)[order], axis=1)
    splits = [wide[start : start + 23] for start in range(0, 230, 23)]
    expected = [np.exp(rel_entr(split, split.mean(axis=0)).sum(axis=1).mean()) for split in splits]
    score, deviation = inception_score(logits, seed=7)
    assert score == pytest.approx(np.mean(expected), rel=RELATIVE)
    assert deviation == pytest.approx(np.std(expected, ddof=1), rel=RELATIVE)


def test_inception_score_is_between_one_and_the_number_of_classes() -> None:
    sure = 200.0 * np.eye(10, dtype=np.float32)[np.arange(1000) % 10]
    assert inception_score(np.zeros((1000, 10), dtype=np.float32), seed=0)[0] == pytest.approx(1)
    assert 9 < inception_score(sure, seed=0)[0] <= 10 + 1e-9


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rows", [37, 2000])
def test_precision_and_recall_are_those_of_their_definition(
    sizes: tuple[int, int, int], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "ROWS", rows)  # blocks of distances
    real, drawn = two_sets(*sizes)

    def share(points: np.ndarray, others: np.ndarray) -> float:
        own = cdist(points, points)
        np.fill_diagonal(own, np.inf)
        radius = np.sort(own, axis=1)[:, 2]
        return float(np.mean([(distances <= radius).any() for distances in cdist(others, points)]))

    wide, others = real.astype(np.float64), drawn.astype(np.float64)
    precision, recall = precision_recall(real, drawn)
    assert 0 < precision < 1 or 0 < recall < 1
    assert (precision, recall) == (share(wide, others), share(others, wide))


def test_a_set_covers_itself_and_nothing_far_away() -> None:
    real, _ = two_sets(200, 10, 16)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)
    assert precision_recall(real, real[:1].repeat(50, axis=0)) == (1, 1 / 200)  # one image again and again
