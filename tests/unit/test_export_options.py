"""Options of the backbone, shifted times and a guidance interval in an exported folder: images equal ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_export_diffusers import draw_with_diffusers, labels_of, make_run, noise_of, own_modules, relative_error
from torch import Tensor

from sdit.checkpoint.export_folder import export_diffusers
from sdit.checkpoint.load import load_model
from sdit.diffusion import SamplerSettings, sample
from sdit.interop import load_published, read_diffusers_config, read_diffusers_folder
from sdit.model import DiffusionTransformer, build_model, forward_with_guidance

__all__ = ["own_modules"]  # a fixture that pytest finds here

MODELS = {
    "dit": ("model.variant=dit", "model.norm=rms", "model.ffn=swiglu", "model.rope=true"),
    "switch": (
        "model.variant=switch", "model.norm=rms", "model.ffn=swiglu", "model.qk_norm=rms", "model.rope=true",
        "model.positions=none",
    ),
    "dtr": ("model.variant=dtr", "model.qk_norm=layer", "model.position_base=5", "model.rope=true"),
    "scaled times": ("model.variant=switch", "model.time_scale=1", "model.position_base=3"),
}  # fmt: skip
SAMPLERS = {
    "euler": (
        "sample.sampler=euler", "sample.steps=7", "diffusion.path=flow", "model.learn_variance=false",
        "sample.time_shift=3", "sample.guidance_interval=[0.3,0.9]",
    ),
    "ddim": ("sample.sampler=ddim", "sample.steps=10", "sample.guidance_interval=[0.2,0.6]"),
}  # fmt: skip


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("model", MODELS)
def test_images_of_each_option_equal_ours(tmp_path: Path, model: str, sampler: str) -> None:
    config = make_run(tmp_path / "run", *MODELS[model], *SAMPLERS[sampler])
    _, differences = export_diffusers(tmp_path / "run", tmp_path / "out", "ema", torch.float32)
    assert not differences
    trained = load_model(tmp_path / "run").model
    settings = SamplerSettings.from_config(config.diffusion, config.sample, config.model.timesteps)

    def predict(x: Tensor, t: int | float, y: Tensor) -> Tensor:
        scale = config.sample.guidance if settings.guides_at(t) else 1.0
        return forward_with_guidance(trained, x, t, y, scale)

    expected = sample(predict, noise_of(config), torch.tensor(labels_of(config)), settings)
    low, high = config.sample.guidance_interval
    found = draw_with_diffusers(tmp_path / "out", config, guidance_interval=(low, high))
    assert relative_error(found, expected) < 1e-4
    assert f"guidance_interval=({low:g}, {high:g})" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("model", MODELS)
def test_each_option_is_read_back(tmp_path: Path, model: str) -> None:
    config = make_run(tmp_path / "run", *MODELS[model])
    export_diffusers(tmp_path / "run", tmp_path / "out", "ema", torch.float32)
    trained = load_model(tmp_path / "run").model
    back = build_model(read_diffusers_config(tmp_path / "out"))
    assert back.config == config.model
    load_published(back, read_diffusers_folder(tmp_path / "out"))
    trained.save_pretrained(tmp_path / "folder")
    again = DiffusionTransformer.from_pretrained(tmp_path / "folder")
    for name, parameter in trained.named_parameters():
        assert torch.equal(back.get_parameter(name), parameter), name
        assert torch.equal(again.get_parameter(name), parameter), name
    inputs = noise_of(config), torch.arange(6), torch.tensor(labels_of(config))
    with torch.no_grad():
        assert torch.equal(again(*inputs).prediction, trained(*inputs).prediction)
