"""The loader of the TorchScript Inception, on a small stand-in with the same signature: the real weights are not here."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sdit.errors import ConfigError
from sdit.evaluate.inception import InceptionFeatures


class StandIn(nn.Module):
    """What is known of inception-2015-12-05.pt: its arguments, 0..255 RGB in, `output` as the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(12, 7)

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        features = nn.functional.adaptive_avg_pool2d(img.to(torch.float32), [2, 2]).flatten(1) / 128.0 - 1.0
        if return_features:
            return features
        if no_output_bias:
            return nn.functional.linear(features, self.output.weight).softmax(dim=1)
        return self.output(features).softmax(dim=1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("weights") / "inception.pt"
    torch.jit.script(StandIn()).save(str(target))
    return target


def test_features_and_logits_are_the_files(path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (120, 9, 9, 3), dtype=np.uint8)
    network = InceptionFeatures(path)
    features, logits = network(images)
    module = torch.jit.load(str(path))
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    assert np.allclose(features, module(pixels, return_features=True), atol=1e-6)
    probabilities = torch.from_numpy(logits).softmax(dim=1)
    assert torch.allclose(probabilities, module(pixels, no_output_bias=True), atol=1e-6)
    assert network.digest == network.facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_grey_images_are_read_as_rgb(path: Path) -> None:
    network = InceptionFeatures(path)
    grey = np.random.default_rng(1).integers(0, 256, (3, 9, 9, 1), dtype=np.uint8)
    assert np.array_equal(network(grey)[0], network(grey.repeat(3, axis=3))[0])
    with pytest.raises(ConfigError, match="legal: 1"):
        network.check((9, 9, 4))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.pt: No such file"):
        InceptionFeatures(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("text")
    torch.jit.script(nn.ReLU()).save(str(tmp_path / "relu.pt"))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pt")
    for name in ("text", "relu", "weights"):
        with pytest.raises(ConfigError, match=f"{name}.pt: is no TorchScript Inception") as refusal:
            InceptionFeatures(tmp_path / f"{name}.pt")
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 300
