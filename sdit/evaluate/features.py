"""What a feature network is, and streams of images. n images, H x W pixels, C channels, D features, K classes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from sdit.errors import ConfigError

Batches = Iterable[np.ndarray]  # arrays (n, H, W, C) uint8


class FeatureNetwork(Protocol):
    """Turns images into the features that scores are computed from."""

    digest: str  # sha256 of the weights; equal digests give comparable scores

    @property
    def facts(self) -> dict[str, Any]:
        """What the network is, as JSON."""

    def check(self, shape: tuple[int, int, int]) -> None:
        """ConfigError unless the network takes images of this (H, W, C)."""

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features (n, D) and logits (n, K), float32, of images (n, H, W, C) uint8."""


def rebatched(images: Batches, size: int) -> Iterator[np.ndarray]:
    """The same images in batches of `size`, the last one smaller. Raises: ConfigError for what are no images."""
    held: list[np.ndarray] = []
    count = 0
    for batch in images:
        if batch.dtype != np.uint8 or batch.ndim != 4:
            raise ConfigError(f"images: {batch.dtype} of shape {batch.shape}; legal: uint8 of shape (n, H, W, C)")
        held.append(batch)
        count += len(batch)
        while count >= size:
            joined = np.concatenate(held)
            yield joined[:size]
            held, count = [joined[size:]], count - size
    if count:
        yield np.concatenate(held)


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and values of all tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
