"""The Inception network that published scores rest on, from a local TorchScript file. n images, C channels."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdit.checked_files import read_regular
from sdit.errors import ConfigError

CHUNK = 50  # images a call: 299 x 299 pixels in 50 copies are 54 MB, the activations several times that


class InceptionFeatures:
    """`inception-2015-12-05.pt`, the TorchScript of the TensorFlow graph behind ADM's and StyleGAN's scores.

    It resizes 0..255 RGB to 299 x 299 itself, the way the graph did. Features are its 2,048 pooled activations; logits are its
    last layer without the bias, as the original Inception score had it. TorchScript is interpreted by torch and runs no
    Python of the file.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        try:
            content = read_regular(path)
        except OSError as error:
            legal = "legal: trained, or a local inception-2015-12-05.pt"
            raise ConfigError(f"--features: {path}: {error.strerror}; {legal}") from None
        self.digest = hashlib.sha256(content).hexdigest()
        self._device = torch.device(device)
        self._path = path
        try:
            self._network = torch.jit.load(str(path), map_location=self._device).eval()
            self._weight = self._network.output.weight.detach()
        except (RuntimeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0].partition(". ")[0]
            problem = f"is no TorchScript Inception with an output layer ({reason})"
            raise ConfigError(f"--features: {path}: {problem}") from None

    @property
    def dimensions(self) -> int:
        """Number of features D."""
        return int(self._weight.shape[1])

    @property
    def facts(self) -> dict[str, Any]:
        return {"kind": "inception", "sha256": self.digest, "file": self._path.name, "device": self._device.type}

    def check(self, shape: tuple[int, int, int]) -> None:
        if shape[2] not in (1, 3):
            raise ConfigError(f"features: images of {shape[2]} channels; legal: 1 (grey, repeated), 3 (RGB)")

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = [self._features(images[start : start + CHUNK]) for start in range(0, len(images), CHUNK)]
        features = torch.cat(parts)
        logits = features @ self._weight.T
        return features.cpu().numpy(), logits.cpu().numpy()

    def _features(self, images: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(self._device)
        return self._network(pixels.expand(-1, 3, -1, -1), return_features=True).float()
