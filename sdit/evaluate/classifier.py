"""A small convolutional classifier, trained on the data set itself, whose penultimate layer serves as features.

For images on which Inception says little (grey, up to 64 x 64). Training is seeded and runs on one thread, so that a machine
always finds the same weights; they are kept in a cache. n images, H = W pixels, C channels, K classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from sdit.caches import user_cache
from sdit.contracts import Progress
from sdit.errors import CheckpointError, ConfigError, DataError
from sdit.evaluate.features import weights_digest
from sdit.files import file_lock, replacing
from sdit.safetensors_file import read_header

FEATURES = 128
CHANNELS = (16, 32, 64, 64)  # of the stages, each of which halves the image, down to 4 x 4
LAST_SIZE = 4
MAX_SIZE = LAST_SIZE * 2 ** len(CHANNELS)
BATCH = 128
EPOCHS = 3
MIN_STEPS = 600  # small data sets are read more often
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 1e-2
HELD_OUT_EVERY = 20  # every 20th image is held out to measure the accuracy
RECIPE = 1  # raise it with every change to what training yields


class Classifier(nn.Module):
    """Convolutions, each with a normalisation and a halving, a layer of features, and one of logits."""

    def __init__(self, size: int, channels: int, classes: int) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for width in CHANNELS:
            stages += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
            if size >= 2 * LAST_SIZE:
                stages.append(nn.MaxPool2d(2))
                size //= 2
            if size < 2 * LAST_SIZE:
                break
        self.stages = nn.Sequential(*stages)
        self.hidden = nn.Linear(channels * size * size, FEATURES)
        self.output = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, 128) and logits (n, K) of images (n, C, H, W) uint8."""
        pixels = images.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        features = functional.relu(self.hidden(self.stages(pixels).flatten(1)))
        return features, self.output(features)


class TrainedFeatures:
    """A trained classifier as a feature network."""

    def __init__(self, model: Classifier, recipe: dict[str, Any], held_out_accuracy: float) -> None:
        self._model = model.eval()
        self._recipe = recipe
        self._accuracy = held_out_accuracy
        self.digest = weights_digest(model.state_dict())

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "kind": "classifier trained on the data",
            "sha256": self.digest,
            "recipe": self._recipe,
            "held_out_accuracy": self._accuracy,
        }

    def check(self, shape: tuple[int, int, int]) -> None:
        expected = tuple(self._recipe["shape"])
        if shape != expected:
            raise ConfigError(f"features: trained on images of shape {expected}, these have {shape}")

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features, logits = self._model(_tensor(images))
        return features.numpy(), logits.numpy()


def trained_features(
    pixels: np.ndarray, labels: np.ndarray, classes: int, seed: int = 0, cache: Path | None = None,
    progress: Progress | None = None,
) -> TrainedFeatures:  # fmt: skip
    """The network trained on pixels (N, H, W, C) uint8 with labels (N,) int64, out of the folder `cache` if it is there.

    `cache` None: the user's cache folder. `progress` is called with (steps done, all steps).

    Raises:
        ConfigError: images or labels that such a network cannot be trained on.
    """
    recipe = _recipe(pixels, labels, classes, seed)
    folder = cache if cache is not None else default_cache()
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:24]
    path = folder / f"classifier-{key}.safetensors"
    with file_lock(path.with_suffix(".lock")):  # the first process trains the network, the others read it
        if not path.exists():
            model, accuracy = _train(pixels, labels, classes, seed, progress)
            facts = {"recipe": json.dumps(recipe), "held_out_accuracy": repr(accuracy)}
            with replacing(path) as file:
                file.write(save({name: values.contiguous() for name, values in model.state_dict().items()}, facts))
        return _read(path, recipe)


def default_cache() -> Path:
    """Where trained feature networks are kept: $XDG_CACHE_HOME/sdit/features. Raises: ConfigError without a home."""
    folder = user_cache()
    if folder is None:
        raise ConfigError("cache: is not set, and the user has no home folder; legal: a folder, or XDG_CACHE_HOME")
    return folder / "sdit" / "features"


def check_learnable(shape: tuple[int, int, int], classes: int) -> None:
    """ConfigError unless the classifier can be trained on images (H, W, C) of this many classes."""
    height, width, _ = shape
    if height != width or not LAST_SIZE <= height <= MAX_SIZE or height & (height - 1):
        legal = f"{LAST_SIZE}, {2 * LAST_SIZE}, ... {MAX_SIZE}, square; for others give an Inception file"
        raise ConfigError(f"features: images of {height} x {width} pixels cannot be learnt; legal: {legal}")
    if classes < 2:
        legal = "legal: labelled images of 2 classes or more"
        raise ConfigError(f"features: {classes} classes cannot be distinguished; {legal}")


def _recipe(pixels: np.ndarray, labels: np.ndarray, classes: int, seed: int) -> dict[str, Any]:
    """Everything that decides the weights, on one machine."""
    shape = tuple(int(size) for size in pixels.shape[1:])
    if pixels.dtype != np.uint8 or len(shape) != 3 or len(pixels) != len(labels):
        raise ConfigError(f"features: {pixels.dtype} images {pixels.shape} with labels {labels.shape} cannot be learnt")
    check_learnable((shape[0], shape[1], shape[2]), classes)
    if labels.min() < 0 or labels.max() >= classes:
        raise ConfigError(f"features: labels {labels.min()}..{labels.max()}; legal: 0..{classes - 1}")
    content = hashlib.sha256(np.ascontiguousarray(pixels).data)
    content.update(labels.astype("<i8").tobytes())
    return {"version": RECIPE, "data": content.hexdigest(), "seed": seed, "shape": shape, "classes": classes}


def _train(
    pixels: np.ndarray, labels: np.ndarray, classes: int, seed: int, progress: Progress | None
) -> tuple[Classifier, float]:
    """The trained model and its accuracy on the images held out."""
    held_out = np.arange(len(pixels)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    images, targets = _tensor(pixels[~held_out]), torch.from_numpy(labels[~held_out].astype(np.int64))
    steps = max(EPOCHS * len(images) // BATCH, MIN_STEPS)
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(pixels.shape[1], pixels.shape[3], classes).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        for step, rows in zip(range(steps), _shuffled(len(images)), strict=False):
            loss = functional.cross_entropy(model(images[rows])[1], targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(step + 1, steps)
        return model, _accuracy(model.eval(), pixels[held_out], labels[held_out])


@torch.no_grad()
def _accuracy(model: Classifier, pixels: np.ndarray, labels: np.ndarray) -> float:
    starts = range(0, len(pixels), 1024)
    right = [(model(_tensor(pixels[s : s + 1024]))[1].argmax(1).numpy() == labels[s : s + 1024]).sum() for s in starts]
    return float(np.sum(right)) / max(1, len(pixels))


def _shuffled(count: int) -> Iterator[Tensor]:
    """Batches of positions without end, each position once an epoch; of the torch generator in force."""
    while True:
        yield from torch.randperm(count).split(BATCH)


def _tensor(images: np.ndarray) -> Tensor:
    """(n, C, H, W) uint8 of images (n, H, W, C)."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _read(path: Path, recipe: dict[str, Any]) -> TrainedFeatures:
    """The network of a cache file. Raises: DataError."""
    try:
        read_header(path)
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, CheckpointError) as error:
        raise DataError(f"{path}: cannot be read: {error}; delete it, and it is trained again") from None
    height, _, channels = recipe["shape"]
    with torch.device("meta"):  # draws no random numbers
        model = Classifier(height, channels, recipe["classes"])
    model.load_state_dict(tensors, assign=True)
    return TrainedFeatures(model, recipe, float(facts["held_out_accuracy"]))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
