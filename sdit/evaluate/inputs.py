"""The images of an evaluation, opened and compared with one another before any image is sampled."""

from __future__ import annotations

from sdit.checkpoint.load import Trained
from sdit.data.classes import class_differences
from sdit.errors import ConfigError
from sdit.evaluate.classifier import check_learnable
from sdit.evaluate.images import ImageSet, LabelledImages, open_images
from sdit.evaluate.reference import ReferenceSource
from sdit.evaluate.request import TRAINED, EvaluationRequest
from sdit.evaluate.trees import ImageTree, LabelledTree, Shape, TreeImages


class EvaluationInputs:
    """The reference, the samples of `request.samples`, and the images that features are trained on.

    Raises: ConfigError, DataError: they cannot be read, or do not fit together.
    """

    def __init__(self, request: EvaluationRequest) -> None:
        self._request = request
        self.reference = ReferenceSource(request.reference, request.skip_bad)
        self.samples = self._open_samples()
        self._training = self._open_training()

    def shape(self, sampled: ImageSet | None = None) -> Shape | None:
        """Return (H, W, C) of the images to score, or else of the reference.

        None if images that are not sampled yet decide it, or if the reference holds no images.
        """
        scored = sampled or self.samples
        if scored is not None:
            return scored.shape
        if isinstance(self.reference.images, ImageTree):
            return None if self._request.checkpoint else self.reference.images.common_shape(self._request.size)
        return self.reference.shape

    def training(self, shape: Shape | None) -> LabelledImages | LabelledTree | None:
        """Return the images for trained features in the shape of those to score; None for features from a file."""
        if not isinstance(self._training, ImageTree):
            return self._training
        return LabelledTree(self._training, shape or self._training.common_shape(None))

    def check_sampled(self, sampled: ImageSet) -> None:
        """Compare images that will be sampled with the other images. Raises: ConfigError, DataError."""
        self._check_shape(sampled)
        training = self.training(sampled.shape)
        if training is not None:
            check_learnable(training.shape, training.classes)

    def class_differences(self, trained: Trained) -> str:
        """Return how the reference's classes differ from those that the model was trained on; empty if they do not.

        Their order does not matter to a score, and where only their numbers are known, nothing is refused.
        Raises: ConfigError if their names differ, unless `allow_other_classes` is set.
        """
        # An unconditional model samples the classes of its data as well.
        model = trained.data.labels if trained.data is not None else trained.classes
        differences = class_differences(self.reference.classes, model, ordered=False)
        if not differences:
            return ""
        fact = f"--reference: {self.reference.name} does not hold the classes of {trained.origin}: {differences}"
        if self.reference.classes.names and model.names and not self._request.allow_other_classes:
            raise ConfigError(f"{fact}; legal: a reference of the same classes, or --allow-other-classes")
        return fact

    def _open_samples(self) -> ImageSet | None:
        request, shape = self._request, self.reference.shape
        if not request.samples:
            return None
        samples = open_images(request.samples, request.skip_bad)
        if isinstance(samples, ImageTree):
            found = samples.common_shape(request.size)
            channels = found[2] if shape is None else shape[2]  # grey images are often stored as RGB
            samples = TreeImages(samples, (*found[:2], channels), is_sample=True)
        elif request.size is not None and request.size != samples.shape[0]:
            held = f"{request.samples} holds images {samples.shape}"
            raise ConfigError(f"--size: {request.size}, but {held}; legal: a folder")
        self._check_shape(samples)
        return samples

    def _open_training(self) -> LabelledImages | ImageTree | None:
        request = self._request
        if request.features != TRAINED:
            return None
        name = request.train_on or request.reference
        images = open_images(name, request.skip_bad) if request.train_on else self.reference.images
        shape = self.shape()
        if isinstance(images, ImageTree):
            if shape is not None:
                check_learnable(shape, LabelledTree(images, shape).classes)
            return images
        if not isinstance(images, LabelledImages):
            key = "--train-on" if request.train_on else "--train-on is not set, and --reference"
            legal = "legal: digits, a folder of prepared images, or one with a folder of image files for each class"
            raise ConfigError(f"{key}: {name} holds no labels; {legal}")
        check_learnable(images.shape, images.classes)
        return images

    def _check_shape(self, images: ImageSet) -> None:
        """Raise ConfigError if the reference is known to hold images of another size or other channels."""
        source = self.reference
        if source.shape not in (None, images.shape):
            held = f"{source.name} holds images {source.shape}"
            raise ConfigError(f"--reference: {held}, those to score have {images.shape}")
