"""What images are held against: statistics of a data set, made here or read from a file. D features."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdit.data.classes import Classes
from sdit.errors import ConfigError, DataError
from sdit.evaluate.features import Batches, FeatureNetwork
from sdit.evaluate.images import ImageSet, LabelledImages, open_images, readable_npz
from sdit.evaluate.statistics import FeatureStatistics, Seen, statistics_of
from sdit.evaluate.trees import ImageTree, Shape, TreeImages
from sdit.files import replacing

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


def check_dimensions(reference: Reference, features: int) -> None:
    """ConfigError if the reference holds another number of features."""
    held = len(reference.statistics.mean)
    if held != features:
        raise ConfigError(f"--reference: {reference.name} holds {held} features, not {features}")


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
        "classes": reference.classes.count,
        "class_names": list(reference.classes.names),
    }
    arrays: dict[str, Any] = {"mu": real.mean, "sigma": real.covariance, "sdit": np.array(json.dumps(facts))}
    if real.features is not None:
        arrays["features"] = real.features
    with replacing(path) as file:
        np.savez(file, **arrays)


class ReferenceSource:
    """A reference as the user names it: `digits`, a folder, an npz of images, of statistics, or of both.

    Opening it is cheap and finds most mistakes; `images` is None if it holds only statistics, and a tree until it is known
    which shape its files are cropped to.
    """

    def __init__(self, source: str, skip_bad: bool = False) -> None:
        self.name = source
        is_npz = source.endswith(".npz") and not Path(source).is_dir()
        self.statistics = _read_statistics(Path(source)) if is_npz else None
        self.images: ImageSet | ImageTree | None = None
        if self.statistics is None or _holds_images(Path(source)):
            self.images = open_images(source, skip_bad)

    @property
    def classes(self) -> Classes:
        """The classes of the reference's images; 0 where they are not known, as of an npz that another program wrote."""
        if isinstance(self.images, LabelledImages):
            return Classes(self.images.classes, self.images.class_names)
        return UNKNOWN if self.statistics is None else self.statistics.classes

    @property
    def shape(self) -> Shape | None:
        """(H, W, C) of the reference's images, if they have one already."""
        return None if self.images is None or isinstance(self.images, ImageTree) else self.images.shape

    def images_of(self, shape: Shape | None) -> ImageSet | None:
        """The images; those of a tree in `shape`, or in what they have in common."""
        if isinstance(self.images, ImageTree):
            return TreeImages(self.images, shape or self.images.common_shape(None), is_sample=False)
        return self.images

    def load(self, network: FeatureNetwork, seen: Seen | None = None, images: ImageSet | None = None) -> Reference:
        """The reference in features of `network`; `images` are those of `images_of`. Reading them takes the time.

        A foreign file's mu and sigma count for FID, and its images, often fewer, for the other scores, as in ADM's evaluation.

        Raises:
            ConfigError: made by another network, or for images of another kind.
        """
        images = images or self.images_of(None)
        if self.statistics is None:
            assert images is not None
            return replace(reference_of(images.batches(), network, self.name, seen), classes=self.classes)
        check_network(self.statistics, network)
        if images is None:
            return self.statistics
        given, own = self.statistics.statistics, statistics_of(images.batches(), network, seen)
        merged = replace(given, features=own.features, logits=own.logits, images=given.images or own.images)
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
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{path}: mu or sigma hold values that are not finite")
    if not np.allclose(covariance, covariance.T, atol=1e-4 * np.abs(covariance).max()):
        raise DataError(f"{path}: sigma is not symmetric; legal: a covariance (D, D)")
    statistics = FeatureStatistics(facts.get("count"), mean, covariance, features, None, facts.get("images"))
    return Reference(str(facts.get("name", path)), statistics, facts.get("network"), _classes(facts, path))


def _classes(facts: dict[str, Any], path: Path) -> Classes:
    """The classes that --save-reference wrote; none are known of other files."""
    count, names = facts.get("classes", 0), facts.get("class_names", [])
    is_text = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not isinstance(count, int) or not is_text or (names and len(names) != count):
        raise DataError(f"{path}: classes {count!r} and class_names do not fit together; make the file again")
    return Classes(count, tuple(names))
