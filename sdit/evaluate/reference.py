"""What images are held against: statistics of a data set, made here or read from a file. D features."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdit.data.classes import Classes
from sdit.data.durable import replacing
from sdit.errors import ConfigError, DataError
from sdit.evaluate.features import Batches, FeatureNetwork
from sdit.evaluate.images import ImageSet, LabelledImages, Shape, open_images, readable_npz
from sdit.evaluate.statistics import FeatureStatistics, Seen, statistics_of

UNKNOWN = Classes(0)


@dataclass(frozen=True)
class Reference:
    """Statistics of the images that others are held against.

    `name` for people; `network` sha256 of the feature network, or None where a foreign file does not say; `classes` of
    the images, of which nothing is known (0, no names) where a file does not say.
    """

    name: str
    statistics: FeatureStatistics
    network: str | None
    classes: Classes = UNKNOWN


def reference_of(images: Batches, network: FeatureNetwork, name: str, seen: Seen | None = None) -> Reference:
    """The reference made of a stream of images (n, H, W, C) uint8. Raises: ConfigError, DataError."""
    return Reference(name, statistics_of(images, network, seen), network.digest)


def check_network(reference: Reference, network: FeatureNetwork) -> None:
    """ConfigError if the reference was made by another feature network."""
    if reference.network not in (None, network.digest):
        raise ConfigError(
            f"--reference: {reference.name} was made with features {str(reference.network)[:16]}, "
            f"not with {network.digest[:16]}; make it again, or choose its features"
        )


def save_reference(path: Path, reference: Reference) -> None:
    """Write mu (D,) and sigma (D, D) under the names that ADM's and pytorch-fid's code read, and what only ours does."""
    real = reference.statistics
    facts: dict[str, Any] = {
        "name": reference.name,
        "network": reference.network,
        "count": real.count,
        "images": real.images,
    }
    facts |= {"classes": reference.classes.count, "class_names": list(reference.classes.names)}
    arrays: dict[str, Any] = {"mu": real.mean, "sigma": real.covariance, "sdit": np.array(json.dumps(facts))}
    if real.features is not None:
        arrays["features"] = real.features
    with replacing(path) as file:
        np.savez(file, **arrays)


class ReferenceSource:
    """A reference as the user names it: `digits`, a prepared folder, an npz of images, of statistics, or of both.

    Opening it is cheap and finds most mistakes; `images` is None if it holds statistics alone.
    """

    def __init__(self, source: str) -> None:
        self.name = source
        self.statistics = _read_statistics(Path(source)) if source.endswith(".npz") else None
        self.images: ImageSet | None = None
        if self.statistics is None or _holds_images(Path(source)):
            self.images = open_images(source)

    @property
    def classes(self) -> Classes:
        """The classes of the reference's images; 0 where they are not known, as of an npz that another program wrote."""
        if isinstance(self.images, LabelledImages):
            return Classes(self.images.classes, self.images.class_names)
        return UNKNOWN if self.statistics is None else self.statistics.classes

    @property
    def shape(self) -> Shape | None:
        """(H, W, C) of the reference's images, where it has some."""
        return None if self.images is None else self.images.shape

    def load(self, network: FeatureNetwork, seen: Seen | None = None) -> Reference:
        """The reference in features of `network`; with images at hand this is where the time goes.

        A foreign file's mu and sigma count for FID, and its images, often fewer, for the other scores, as in ADM's evaluation.

        Raises:
            ConfigError: made by another network, or for images of another kind.
        """
        if self.statistics is None:
            assert self.images is not None
            return replace(reference_of(self.images.batches(), network, self.name, seen), classes=self.classes)
        check_network(self.statistics, network)
        if self.images is None:
            return self.statistics
        given, own = self.statistics.statistics, statistics_of(self.images.batches(), network, seen)
        merged = FeatureStatistics(
            given.count, given.mean, given.covariance, own.features, own.logits, given.images or own.images
        )
        return Reference(self.name, merged, self.statistics.network, self.classes)


def _holds_images(path: Path) -> bool:
    with readable_npz(path) as archive:
        return "arr_0.npy" in archive.namelist()


def _read_statistics(path: Path) -> Reference | None:
    """The statistics of an npz; None if it holds none."""
    with readable_npz(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        if not {"mu", "sigma"} <= names:
            return None
        with np.load(path, allow_pickle=False) as stored:
            mean, covariance = stored["mu"].astype(np.float64), stored["sigma"].astype(np.float64)
            features = stored["features"] if "features" in names else None
            facts: dict[str, Any] = json.loads(str(stored["sdit"])) if "sdit" in names else {}
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise DataError(f"{path}: mu {mean.shape} and sigma {covariance.shape}; legal: (D,) and (D, D)")
    statistics = FeatureStatistics(facts.get("count"), mean, covariance, features, None, facts.get("images"))
    return Reference(str(facts.get("name", path)), statistics, facts.get("network"), _classes(facts, path))


def _classes(facts: dict[str, Any], path: Path) -> Classes:
    """The classes that --save-reference wrote; none are known of other files."""
    count, names = facts.get("classes", 0), facts.get("class_names", [])
    is_text = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not isinstance(count, int) or not is_text or (names and len(names) != count):
        raise DataError(f"{path}: classes {count!r} and class_names do not fit together; make the file again")
    return Classes(count, tuple(names))
