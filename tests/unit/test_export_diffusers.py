"""Images from an exported folder, drawn by diffusers, equal ours (recipe, section H)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from written_run import tiny_config, write_run

from sdit.checkpoint.export_folder import export_diffusers
from sdit.checkpoint.load import load_model
from sdit.config import Config
from sdit.diffusion import SamplerSettings, sample
from sdit.interop import load_published, read_diffusers_config, read_diffusers_folder
from sdit.model import DiffusionTransformer, build_model, forward_with_guidance
from sdit.randomness import Purpose, normal_noise

diffusers = pytest.importorskip("diffusers", reason="needs the extra sdit[vae]")
DATA = Path(__file__).parents[1] / "data"

MODELS = {
    "dit": ("model.variant=dit",),
    "dtr": ("model.variant=dtr",),
    "switch": ("model.variant=switch",),
    "switch, mlp": ("model.experts.kind=mlp", "model.experts.count=4"),
    "dit, no labels": ("model.variant=dit", "model.classes=0", "sample.guidance=1"),
    "dit, wide mlp": ("model.variant=dit", "model.mlp_ratio=2.5", "model.learn_variance=false"),
}
SAMPLERS = {
    "ddim": ("sample.sampler=ddim", "sample.steps=10"),
    "ddim, clipped": ("sample.sampler=ddim", "sample.steps=5", "diffusion.clip_x0=fixed", "diffusion.clip_range=0.8"),
    "ddim, cosine, v": (
        "sample.sampler=ddim",
        "sample.steps=25",
        "diffusion.schedule=cosine",
        "diffusion.prediction=v",
    ),
    "ddim, epsilon": ("sample.sampler=ddim", "sample.steps=10", "diffusion.prediction=epsilon"),
    "ddim, one step": ("sample.sampler=ddim", "sample.steps=1", "diffusion.prediction=v"),
    "dpm++2m": ("sample.sampler=dpm++2m", "sample.steps=8"),
    "euler, shifted": (  # one of the times is exactly a boundary of two tasks: 0.8
        "sample.sampler=euler", "sample.steps=7", "sample.time_shift=3", "diffusion.path=flow", "model.learn_variance=false",
    ),
    "euler": ("sample.sampler=euler", "sample.steps=7", "diffusion.path=flow", "model.learn_variance=false"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """diffusers copies a folder's Python files to a cache. Processes that test at the same time need one each."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", cache)
        yield


def make_run(folder: Path, *overrides: str) -> Config:
    """A run on 4x4 latents of 4 channels, without clipping unless it is asked for."""
    settings = ("model.channels=4", "diffusion.clip_x0=none", "sample.guidance=2.5", "model.timesteps=100", *overrides)
    config = tiny_config(*settings)
    write_run(folder, config)
    return config


def noise_of(config: Config, count: int = 6) -> Tensor:
    shape = (count, config.model.channels, config.model.input_size, config.model.input_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def labels_of(config: Config, count: int = 6) -> list[int]:
    return [label % max(config.model.classes, 1) for label in range(count)]


def draw(model: DiffusionTransformer, config: Config) -> Tensor:
    """Our images from the noise."""
    settings = SamplerSettings.from_config(config.diffusion, config.sample, config.model.timesteps)
    guidance = config.sample.guidance

    def predict(x: Tensor, t: int | float, y: Tensor) -> Tensor:
        return forward_with_guidance(model, x, t, y, guidance, config.sample.guided_channels)

    return sample(predict, noise_of(config), torch.tensor(labels_of(config)), settings)


def load_pipeline(folder: Path, **options: Any) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        folder, trust_remote_code=True, low_cpu_mem_usage=False, **options
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_with_diffusers(folder: Path, config: Config, **options: Any) -> Tensor:
    """diffusers' images from the same noise, by the pipeline in the folder."""
    pipe = load_pipeline(folder, custom_pipeline="pipeline")
    images = pipe(
        labels_of(config), config.sample.guidance, config.sample.steps, latents=noise_of(config),
        guided_channels=config.sample.guided_channels, output_type="latent", **options,
    ).images  # fmt: skip
    assert isinstance(images, Tensor)
    return images


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("model", MODELS)
def test_images_from_the_folder_equal_ours(tmp_path: Path, model: str, sampler: str) -> None:
    config = make_run(tmp_path / "run", *SAMPLERS[sampler], *MODELS[model])
    _, differences = export_diffusers(tmp_path / "run", tmp_path / "out", "ema", torch.float32)
    assert not differences
    expected = draw(load_model(tmp_path / "run").model, config)
    assert relative_error(draw_with_diffusers(tmp_path / "out", config), expected) < 1e-4


def test_dynamic_clipping_keeps_the_range_and_is_named(tmp_path: Path) -> None:
    overrides = ("model.variant=dit", "diffusion.clip_x0=dynamic", "diffusion.prediction=epsilon", "sample.steps=5")
    config = make_run(tmp_path / "run", *overrides)
    _, (difference,) = export_diffusers(tmp_path / "run", tmp_path / "out", "ema", torch.float32)
    assert "percentile of dynamic clipping" in difference
    assert difference in (tmp_path / "out" / "README.md").read_text()
    images = draw_with_diffusers(tmp_path / "out", config)
    assert float(images.abs().max()) <= 1 + 1e-6


def test_guidance_of_some_channels_at_some_times(tmp_path: Path) -> None:
    """Guidance outside the interval is none; inside, it reaches the first channels only."""
    config = make_run(tmp_path / "run", "model.variant=dtr", "sample.guided_channels=3", "sample.steps=10")
    export_diffusers(tmp_path / "run", tmp_path / "out", "ema", torch.float32)
    assert "guided_channels=3" in (tmp_path / "out" / "README.md").read_text()
    model = load_model(tmp_path / "run").model
    assert relative_error(draw_with_diffusers(tmp_path / "out", config), draw(model, config)) < 1e-4
    settings = SamplerSettings.from_config(config.diffusion, config.sample, config.model.timesteps)

    def predict(x: Tensor, t: int | float, y: Tensor) -> Tensor:
        scale = config.sample.guidance if 0.3 <= t / config.model.timesteps <= 0.7 else 1.0
        return forward_with_guidance(model, x, t, y, scale, 3)

    expected = sample(predict, noise_of(config), torch.tensor(labels_of(config)), settings)
    found = draw_with_diffusers(tmp_path / "out", config, guidance_interval=(0.3, 0.7))
    assert relative_error(found, expected) < 1e-4


def write_vae(folder: Path) -> Any:
    """A randomly initialised AutoencoderKL with a downsampling of 2."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4,
        )  # fmt: skip
    vae.save_pretrained(folder)
    return vae.eval()


@pytest.mark.parametrize("frequencies", ["restored", "as they are"])
def test_a_plain_dit_is_a_stock_pipeline_with_one_line(tmp_path: Path, frequencies: str) -> None:
    """`DiTPipeline` gives our images, decoded by the VAE in the folder, after the line that the README gives."""
    vae = write_vae(tmp_path / "vae")
    overrides = ("model.variant=dit", "model.classes=1000", "data.latent_scale=0.5", "sample.steps=10")
    config = make_run(tmp_path / "run", *overrides)
    export_diffusers(tmp_path / "run", tmp_path / "out", "ema", torch.float32, tmp_path / "vae")
    pipe = diffusers.DiTPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    assert type(pipe) is diffusers.DiTPipeline and type(pipe.transformer) is diffusers.DiTTransformer2DModel
    pipe.set_progress_bar_config(disable=True)
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: diffusers" in readme
    (line,) = (line for line in readme.splitlines() if line.startswith("for block in pipe"))
    if frequencies == "restored":
        exec(line, {"pipe": pipe})
    generator = torch.Generator().manual_seed(5)
    found = pipe(labels_of(config), config.sample.guidance, generator, config.sample.steps, output_type="pt").images
    with torch.no_grad():
        decoded = vae.decode(draw(load_model(tmp_path / "run").model, config) / 0.5).sample
    error = relative_error(found, (decoded / 2 + 0.5).clamp(0, 1))
    assert error < 1e-4 if frequencies == "restored" else error > 1e-3


def test_the_folders_pipeline_decodes_draws_and_names(tmp_path: Path) -> None:
    """The pipeline in the folder needs no line. It draws noise, decodes, and returns PIL images."""
    write_vae(tmp_path / "vae")
    config = make_run(
        tmp_path / "run", "model.variant=switch", "data.latent_scale=0.5", f"sample.vae={tmp_path / 'vae'}"
    )
    export_diffusers(tmp_path / "run", tmp_path / "out", "ema", torch.float32)
    pipe = load_pipeline(tmp_path / "out")
    assert pipe.vae.config.scaling_factor == 0.5
    images = pipe([0, 3], num_inference_steps=5, generator=torch.Generator().manual_seed(1)).images
    assert [image.size for image in images] == [(8, 8), (8, 8)]
    again = pipe([0, 3], num_inference_steps=5, generator=torch.Generator().manual_seed(1), output_type="np").images
    assert again.shape == (2, 8, 8, 3)
    assert np.abs(again[0] * 255 - np.asarray(images[0], dtype=np.float64)).max() <= 0.5 + 1e-3
    for words, message in (
        ({"class_labels": [6]}, r"class_labels: \[6\] are out of range; legal: 0\.\.5 \(5: null\)"),
        ({"class_labels": [0], "latents": torch.zeros(1, 4, 2, 2)}, r"latents: shape \(1, 4, 2, 2\) is not legal"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**words)
    with pytest.raises(ValueError, match="'dog' is not a class; legal: no names"):
        pipe.get_label_ids("dog")
    assert config.sample.vae


@pytest.mark.parametrize(("steps", "learned"), [(100, True), (7, True), (7, False)])
def test_ddpm_with_our_noise_gives_our_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, learned: bool
) -> None:
    """The times, the mean and the variance, learned or of the posterior, are ours. The noise of each step is given."""
    ddpm = ("sample.sampler=ddpm", f"sample.steps={steps}", f"model.learn_variance={str(learned).lower()}")
    config = make_run(tmp_path / "run", "model.variant=dtr", *ddpm)
    _, differences = export_diffusers(tmp_path / "run", tmp_path / "out", "ema", torch.float32)
    assert not differences
    numbers = iter(range(steps - 1, 0, -1))

    def given_noise(shape: Any, **_: Any) -> Tensor:
        noise = normal_noise(0, np.arange(shape[0]), tuple(shape[1:]), Purpose.SAMPLE_STEP, next(numbers))
        return torch.from_numpy(noise).float()

    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", given_noise)
    found = draw_with_diffusers(tmp_path / "out", config)
    assert next(numbers, None) is None
    assert relative_error(found, draw(load_model(tmp_path / "run").model, config)) < 1e-4


@pytest.mark.parametrize("model", ["dit", "dtr", "switch", "switch, mlp"])
def test_the_pipeline_runs_in_bfloat16(tmp_path: Path, model: str) -> None:
    config = make_run(tmp_path / "run", *MODELS[model], "sample.steps=10")
    export_diffusers(tmp_path / "run", tmp_path / "out", "ema", torch.bfloat16)
    pipe = load_pipeline(tmp_path / "out", custom_pipeline="pipeline", torch_dtype=torch.bfloat16)
    images = pipe(labels_of(config), 1.5, 10, latents=noise_of(config), output_type="latent").images
    assert images.dtype == torch.bfloat16 and torch.isfinite(images).all()


@pytest.mark.parametrize("model", MODELS)
def test_an_exported_folder_is_read_back(tmp_path: Path, model: str) -> None:
    config = make_run(tmp_path / "run", *MODELS[model])
    export_diffusers(tmp_path / "run", tmp_path / "out", "weight", torch.float32)
    back = build_model(read_diffusers_config(tmp_path / "out"))
    load_published(back, read_diffusers_folder(tmp_path / "out"))
    expected = dict(load_model(tmp_path / "run", "weight").model.named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in back.named_parameters())
    is_stock = json.loads((tmp_path / "out/transformer/config.json").read_text())["_class_name"].startswith("DiT")
    assert is_stock == (model == "dit")
    if not is_stock:
        assert back.config == config.model


VECTORS = np.load(DATA / "recipe_diffusers.npz")


@pytest.mark.parametrize("function", ["out.eval", "out.diffusers"])
def test_diffusers_computes_the_reference_numbers(function: str) -> None:
    """diffusers' own class gives `out.diffusers`; with our epsilon and the README's line it gives DiT's function."""
    config = json.loads(str(VECTORS["transformer_config"]))
    model = diffusers.DiTTransformer2DModel.from_config(config | ({"norm_eps": 1e-6} if function == "out.eval" else {}))
    model.load_state_dict({n.removeprefix("d."): torch.from_numpy(VECTORS[n]) for n in VECTORS.files if n[:2] == "d."})
    if function == "out.eval":
        for block in model.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, y = (torch.from_numpy(VECTORS[f"in.{name}"]) for name in "xty")
    with torch.no_grad():
        output = model.eval()(x, timestep=t, class_labels=y).sample
    assert relative_error(output, torch.from_numpy(VECTORS[function])) < 1e-4


def shipped_model(meta: dict[str, Any]) -> Any:
    from sdit.interop.diffusers_config import STOCK_KEYS
    from sdit.interop.diffusers_files.sdit_transformer import SditTransformer2DModel

    ours = {ours: theirs for theirs, ours in STOCK_KEYS.items()}
    values = {ours.get(key, key): value for key, value in meta.items() if key not in ("width", "learn_variance")}
    values["attention_head_dim"] = meta["width"] // meta["heads"]
    values["out_channels"] = meta["channels"] * (2 if meta["learn_variance"] else 1)
    return SditTransformer2DModel(**values).eval()


@pytest.mark.parametrize("name", ["lightning", "rms_qknorm", "layer_qknorm", "switch_lightning", "switch_rope"])
def test_the_shipped_network_computes_the_options_of_the_backbone(name: str) -> None:
    """The file in the folder needs nothing of sdit, so it is held against the reference numbers itself."""
    vectors = np.load(DATA / f"recipe_{name}.npz")
    model = shipped_model(json.loads(str(vectors["meta"])))
    weights = {n[2:]: torch.from_numpy(vectors[n]) for n in vectors.files if n.startswith("w.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not missing and set(unexpected) <= {"pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"}
    tables = {"pos_embed": model.position_table}
    if model.rotation_table is not None:
        tables |= dict(zip(("feat_rope.freqs_cos", "feat_rope.freqs_sin"), model.rotation_table, strict=True))
    for table in unexpected:
        assert torch.allclose(tables[table], weights[table], rtol=0, atol=1e-5), table
    x, t, t_flow, y = (torch.from_numpy(vectors[f"in.{key}"]) for key in ("x", "t", "t_flow", "y"))
    with torch.no_grad():
        for output, time in (("out.eval", t), ("out.flow", t_flow * model.config.timesteps)):
            found = model(x, time, y).sample
            assert relative_error(found, torch.from_numpy(vectors[output])) < 1e-4, output


def test_a_scaled_time_is_embedded_as_it_is(tmp_path: Path) -> None:
    """`time_scale` 1 embeds the flow time in [0, 1] itself; the published weights of section A need it."""
    vectors = np.load(DATA / "recipe_lightning.npz")
    meta = json.loads(str(vectors["meta"]))
    model = shipped_model(meta | {"time_scale": 1.0})
    weights = {n[2:]: torch.from_numpy(vectors[n]) for n in vectors.files if n.startswith("w.")}
    model.load_state_dict(weights, strict=False)
    x, t, y = (torch.from_numpy(vectors[f"in.{key}"]) for key in ("x", "t_flow", "y"))
    with torch.no_grad():
        found = -model(x, (1 - t) * model.config.timesteps, y).sample
    assert relative_error(found, torch.from_numpy(vectors["out.published_flow"])) < 1e-4


def test_latent_statistics_of_the_vae_are_used(tmp_path: Path) -> None:
    """z = z' std / scale + mean, for statistics of each channel and of each position."""
    vae = write_vae(tmp_path / "vae")
    make_run(tmp_path / "run", "model.variant=dit", "data.latent_scale=0.5")
    export_diffusers(tmp_path / "run", tmp_path / "out", "ema", torch.float32, tmp_path / "vae")
    pipe = load_pipeline(tmp_path / "out", custom_pipeline="pipeline")
    options = {"num_inference_steps": 5, "latents": torch.randn(1, 4, 4, 4)}
    drawn = pipe([2], output_type="latent", **options).images
    for shape in ((4,), (4, 4, 4)):
        mean, std = torch.randn(shape), 0.5 + torch.rand(shape)
        pipe.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        mean, std = (each.view(-1, 1, 1) if len(shape) == 1 else each for each in (mean, std))
        with torch.no_grad():
            expected = (vae.decode(drawn * std / 0.5 + mean).sample / 2 + 0.5).clamp(0, 1)
        assert relative_error(pipe([2], output_type="pt", **options).images, expected) < 1e-5


WITHOUT_SDIT = """
import sys
sys.modules["sdit"] = None  # every import of it fails
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True, low_cpu_mem_usage=False)
images = pipe([0, 1], 2.5, 10, latents=torch.load(sys.argv[2], weights_only=True), output_type="latent").images
torch.save(images, sys.argv[3])
"""


@pytest.mark.parametrize("variant", ["dtr", "switch"])
def test_the_folder_needs_no_sdit(tmp_path: Path, variant: str) -> None:
    config = make_run(tmp_path / "run", f"model.variant={variant}", "sample.steps=10")
    export_diffusers(tmp_path / "run", tmp_path / "out", "ema", torch.float32)
    expected = draw(load_model(tmp_path / "run").model, config)
    torch.save(noise_of(config)[:2], tmp_path / "noise.pt")
    words = [sys.executable, "-c", WITHOUT_SDIT, tmp_path / "out", tmp_path / "noise.pt", tmp_path / "images.pt"]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert relative_error(torch.load(tmp_path / "images.pt", weights_only=True), expected[:2]) < 1e-4
