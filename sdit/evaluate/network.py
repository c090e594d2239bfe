"""The network whose features an evaluation compares: the checks before images are sampled, and the network itself."""

from __future__ import annotations

from pathlib import Path

import torch

from sdit.caches import can_write, run_caches, use_cache
from sdit.contracts import Progress
from sdit.errors import ConfigError
from sdit.evaluate.classifier import FEATURES, trained_features
from sdit.evaluate.features import FeatureNetwork
from sdit.evaluate.images import LabelledImages
from sdit.evaluate.inception import InceptionFeatures
from sdit.evaluate.reference import Reference, check_dimensions, check_network
from sdit.evaluate.request import TRAINED, EvaluationRequest
from sdit.evaluate.trees import LabelledTree


def check_features(request: EvaluationRequest, statistics: Reference | None) -> None:
    """Compare the features with a reference that holds only statistics (None: it holds images). Raises: ConfigError."""
    network = None if request.features == TRAINED else InceptionFeatures(Path(request.features))
    if statistics is None:
        return
    if network is not None:
        check_network(statistics, network)
    check_dimensions(statistics, FEATURES if network is None else network.dimensions)


def check_cache(request: EvaluationRequest) -> None:
    """Find a folder for trained features. Raises: ConfigError if none can be written."""
    fallbacks = run_caches(request.checkpoint) if request.checkpoint is not None else []
    fallbacks += [path.with_suffix(".cache") for path in (request.out, request.save_reference) if path is not None]
    folder = use_cache(fallbacks)
    if request.features != TRAINED:
        return
    if request.cache is not None and not can_write(request.cache):
        raise ConfigError(f"--cache: {request.cache} cannot be written; legal: a folder that can")
    if request.cache is None and folder is None:
        tried = ", ".join(map(str, fallbacks))
        raise ConfigError(f"--cache: is not set, and neither the user's cache nor {tried} can be written")


def feature_network(
    request: EvaluationRequest, training: LabelledImages | LabelledTree | None, progress: Progress | None
) -> FeatureNetwork:
    """Return the network of `request.features`, trained on `training` if that is given. Raises: ConfigError, DataError."""
    if training is None:
        return InceptionFeatures(Path(request.features), "cuda" if torch.cuda.is_available() else "cpu")
    pixels, labels = training.arrays()
    return trained_features(pixels, labels, training.classes, request.feature_seed, request.cache, progress)
