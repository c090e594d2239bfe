"""Classifier-free guidance."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sdit.errors import ConfigError
from sdit.model import DiffusionTransformer, forward_with_guidance

Batch = tuple[Tensor, Tensor, Tensor]
MakeModel = Callable[..., DiffusionTransformer]


@pytest.mark.parametrize("guided", [None, 1, 2, 3])
def test_guidance_moves_the_first_channels_away_from_the_null_label(
    make_model: MakeModel, batch: Batch, guided: int | None
) -> None:
    model = make_model()
    x, t, y = batch
    conditional, null = model(x, t, y).prediction, model(x, t, torch.full_like(y, 5)).prediction
    expected = conditional.clone()
    channels = guided or 3
    expected[:, :channels] = (null + 4 * (conditional - null))[:, :channels]
    output = forward_with_guidance(model, x, t, y, 4.0, guided)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def _calls(model: DiffusionTransformer) -> list[tuple[int, int]]:
    """A list that will hold the numbers of samples and times of every forward pass."""
    calls: list[tuple[int, int]] = []
    model.register_forward_pre_hook(lambda _, args: calls.append((len(args[0]), torch.as_tensor(args[1]).numel())))
    return calls


def test_no_guidance_is_the_plain_forward(make_model: MakeModel, batch: Batch) -> None:
    model = make_model()
    plain, calls = model(*batch).prediction, _calls(model)
    assert torch.equal(forward_with_guidance(model, *batch, 1.0), plain) and calls == [(6, 6)]


def test_guidance_is_one_forward_that_keeps_a_shared_time(make_model: MakeModel, batch: Batch) -> None:
    model = make_model()
    calls = _calls(model)
    x, _, y = batch
    forward_with_guidance(model, x, 21, y, 1.5)
    forward_with_guidance(model, x, torch.tensor([21]), y, 1.5)
    assert calls == [(12, 1), (12, 1)]


@pytest.mark.parametrize("guided", [0, 4])
def test_guided_channels_are_image_channels(make_model: MakeModel, batch: Batch, guided: int) -> None:
    with pytest.raises(ConfigError, match=rf"sample.guided_channels: {guided} .*1\.\.3"):
        forward_with_guidance(make_model(), *batch, 1.5, guided)


def test_guidance_needs_labels(make_model: MakeModel, batch: Batch) -> None:
    with pytest.raises(ConfigError, match=r"sample.guidance: 1.5"):
        forward_with_guidance(make_model(classes=0), *batch, 1.5)
