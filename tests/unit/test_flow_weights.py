"""Published weights of flow models become ours: time direction, sign and spare channels. LightningDiT's tables are checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sdit.errors import ConfigError
from sdit.interop import FLOW_MODEL, convert_flow_weights, load_published, to_published
from sdit.model import DiffusionTransformer, build_model

SMALL = {
    "variant": "dit", "depth": 2, "width": 16, "heads": 2, "input_size": 4, "channels": 3, "classes": 5, "time_scale": 1.0,
}  # fmt: skip
MODERN = {"norm": "rms", "ffn": "swiglu", "rope": True, "learn_variance": False}


def _model(seed: int = 1, **overrides: Any) -> DiffusionTransformer:
    model = build_model(SMALL | overrides)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 3, 4, 4, generator=generator)
    return x, torch.tensor([0.0, 0.25, 0.7, 1.0]), torch.tensor([0, 2, 4, 5])


def _converted(theirs: DiffusionTransformer, source: str, **options: Any) -> Tensor:
    ours = build_model(SMALL | options | FLOW_MODEL)
    load_published(ours, convert_flow_weights(to_published(theirs), source))
    return ours(*_inputs()).prediction


@pytest.mark.parametrize("source", ["lightningdit", "sit", "dsmoe", "diffmoe"])
@pytest.mark.parametrize("options", [{"learn_variance": True}, MODERN], ids=["spare channels", "modern"])
def test_a_network_whose_time_is_1_at_the_data(source: str, options: dict[str, Any]) -> None:
    """Ours is -net(x, 1 - t, y), without the channels that their code ignores."""
    theirs, (x, t, y) = _model(**options), _inputs()
    expected = -theirs(x, 1 - t, y).prediction[:, :3]
    torch.testing.assert_close(_converted(theirs, source, **options), expected, rtol=1e-4, atol=1e-4)


def test_dit_moe_has_our_time_and_spare_channels() -> None:
    theirs = _model(learn_variance=True, patch_size=1)
    expected = theirs(*_inputs()).prediction[:, :3]
    torch.testing.assert_close(_converted(theirs, "dit_moe", patch_size=1), expected, rtol=1e-5, atol=1e-5)


def test_the_conversion_leaves_the_given_weights_alone() -> None:
    given = {f"module.{name}": value for name, value in to_published(_model(**MODERN)).items()}
    before = {name: value.clone() for name, value in given.items()}
    converted = convert_flow_weights({name: value.half() for name, value in given.items()}, "sit")
    assert all(torch.equal(given[name], before[name]) for name in given)
    assert converted["t_embedder.mlp.0.weight"].dtype == torch.float32  # so that it is rounded once only
    assert converted.keys() == {name.removeprefix("module.") for name in given}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"source: 'pixart' is not known; legal: lightningdit, sit, dsmoe, diffmoe, dit_moe"),
        ({"final_layer.linear.bias": None}, r"source: sit, but the weights have no final_layer\.linear\.bias"),
        ({"final_layer.linear.bias": torch.zeros(36)}, r"final_layer\.linear\.bias has 36 rows; legal: 12, or 24"),
        ({"t_embedder.mlp.0.weight": torch.zeros(16, 128)}, r"t_embedder\.mlp\.0\.weight has shape \(16, 128\)"),
        ({"x_embedder.proj.weight": torch.zeros(16, 12)}, r"the weights have no x_embedder\.proj\.weight of such"),
    ],
)
def test_other_weights_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    weights = {name: value for name, value in (to_published(_model()) | change).items() if value is not None}
    with pytest.raises(ConfigError, match=message) as caught:
        convert_flow_weights(weights, "sit" if change else "pixart")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({"rope": True}, {}, r"model\.rope: false, but the checkpoint was trained with feat_rope\.freqs_cos; legal: true"),
        ({}, {"positions": "none"}, r"model\.positions: none, but the checkpoint was trained with pos_embed; legal: sincos"),
        ({"rope": True}, {"rope": True, "heads": 4}, r"model\.heads: feat_rope\.freqs_cos has shape \(4, 8\), not \(4, 4\)"),
        ({}, {"input_size": 8}, r"model\.input_size: pos_embed has shape \(1, 4, 16\), not \(1, 16, 16\)"),
        ({"position_base": 1}, {}, r"pos_embed differs from the fixed sin-cos positions by more than"),
        ({}, {"position_base": 1}, r"pos_embed differs .* of model\.position_base 1 by more than"),
        ({"rope": True, "positions": "none", "position_base": 1}, {"rope": True, "positions": "none"}, r"freqs_cos differs"),
    ],
)  # fmt: skip
def test_tables_of_another_config_are_refused(theirs: dict[str, Any], ours: dict[str, Any], message: str) -> None:
    model = _model(seed=2, **ours)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ConfigError, match=message) as caught:
        load_published(model, to_published(_model(**theirs)))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ["dit", "switch", "dtr"])
def test_lightningdit_names_round_trip(variant: str, dtype: torch.dtype) -> None:
    options = {**MODERN, "variant": variant, "qk_norm": "layer"}
    published = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in to_published(_model(**options)).items()
    }
    assert published.keys() >= {"pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin", "blocks.1.mlp.w12.weight"}
    assert published["feat_rope.freqs_sin"].shape == (4, 8)
    other = _model(seed=2, **options)
    load_published(other, published)
    assert all(torch.equal(value, published[name].float()) for name, value in other.named_parameters())


def test_tables_that_were_computed_in_float32_are_accepted() -> None:
    """As LightningDiT computes them: frequencies, coordinates and products in float32. The largest grid is 128 x 128."""
    model = build_model({**SMALL, **MODERN, "patch_size": 1, "input_size": 128})
    published = to_published(model)
    frequency = 1 / (10000 ** (torch.arange(0, 4, 2).float() / 4))
    line = (torch.arange(128).float()[:, None] * frequency).repeat_interleave(2, 1)
    angle = torch.cat([line[:, None].expand(-1, 128, -1), line[None].expand(128, -1, -1)], -1).view(-1, 8)
    load_published(model, published | {"feat_rope.freqs_cos": angle.cos(), "feat_rope.freqs_sin": angle.sin()})
