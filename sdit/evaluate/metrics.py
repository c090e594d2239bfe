"""FID, KID, Inception score, improved precision and recall of features. n features of D numbers; all in float64."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000  # or all, where there are fewer
SPLITS = 10
NEIGHBOURS = 3
ROWS = 2000  # of a block of distances: 2,000 x 10,000 float64 are 160 MB


def frechet_distance(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray
) -> float:
    """|m - m'|^2 + Tr(S + S' - 2 (S S')^1/2) of two Gaussians with means (D,) and covariances (D, D).

    torchmetrics cannot take a reference that is a file of moments, and goes through the eigenvalues of S S', which is not
    symmetric. Tr (S S')^1/2 is also the sum of the singular values of S^1/2 S'^1/2, which are real and non-negative.
    """
    cross = np.linalg.svd(_root(covariance) @ _root(other_covariance), compute_uv=False).sum()
    shift = mean - other_mean
    return float(shift @ shift + np.trace(covariance) + np.trace(other_covariance) - 2 * cross)


def kernel_distance(real: np.ndarray, drawn: np.ndarray, seed: int) -> tuple[float, float]:
    """KID, mean and standard deviation over subsets, of features (n, D) and (m, D) (Binkowski et al. 2018, unbiased)."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # about features in memory: ours are limited
        metric = KernelInceptionDistance(nn.Identity(), subsets=KID_SUBSETS, subset_size=subset_size(real, drawn))
    metric.update(_wide(real), real=True)
    metric.update(_wide(drawn), real=False)
    return _mean_and_deviation(metric, seed)


def subset_size(real: np.ndarray, drawn: np.ndarray) -> int:
    """Features in one of KID's subsets."""
    return min(KID_SUBSET_SIZE, len(real), len(drawn))


def inception_score(logits: np.ndarray, seed: int) -> tuple[float, float]:
    """Mean and standard deviation over 10 random splits of exp(E KL(p(y|x) | p(y))), of logits (n, K)."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        metric = InceptionScore(nn.Identity(), splits=SPLITS)
    metric.update(_wide(logits))
    return _mean_and_deviation(metric, seed)


def precision_recall(real: np.ndarray, drawn: np.ndarray) -> tuple[float, float]:
    """Shares of drawn features (m, D) among the real ones (n, D), and the reverse (Kynkäänniemi et al. 2019, k = 3).

    A feature is among a set if it is no farther from one of them than that one's third neighbour in the set.
    """
    centre = real.mean(axis=0, dtype=np.float64)
    points, others = (torch.from_numpy(rows - centre) for rows in (real, drawn))
    return _share_within(points, others), _share_within(others, points)


def _share_within(points: Tensor, others: Tensor) -> float:
    """Share of the others (m, D) that lie in a ball around a point (n, D), out to that point's third neighbour."""
    neighbours = min(NEIGHBOURS, len(points) - 1)
    radii = [
        squared_distances(rows, points).kthvalue(neighbours + 1, dim=1).values  # the nearest is the point itself
        for rows in points.split(ROWS)
    ]
    radius = torch.cat(radii)
    inside = sum(int((squared_distances(rows, points) <= radius).any(dim=1).sum()) for rows in others.split(ROWS))
    return inside / len(others)


def squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """(n, m) squared distances of rows (n, D) to columns (m, D)."""
    norms = rows.square().sum(1, keepdim=True) + columns.square().sum(1)
    return torch.addmm(norms, rows, columns.T, alpha=-2).clamp_(min=0)


def _root(covariance: np.ndarray) -> np.ndarray:
    """Symmetric square root (D, D) of a positive semi-definite matrix.

    With fewer images than features many eigenvalues are zero but for rounding, whose root would count: they are left out.
    """
    values, vectors = np.linalg.eigh(covariance)
    rounding = len(values) * np.finfo(values.dtype).eps * values[-1]
    return (vectors * np.sqrt(np.where(values > rounding, values, 0))) @ vectors.T


def _wide(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(rows.astype(np.float64))


def _mean_and_deviation(metric: Metric, seed: int) -> tuple[float, float]:
    """torchmetrics draws subsets from the global generator, which is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)
