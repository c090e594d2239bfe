"""The section of the model card that says how a diffusers folder is used."""

from __future__ import annotations

from collections.abc import Sequence

from sdit.config import Config
from sdit.interop.diffusers_config import is_plain

STOCK_CLASSES = 1000  # DiTPipeline's null label
FREQUENCY_LINE = "for block in pipe.transformer.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0"


def diffusers_usage(config: Config, differences: Sequence[str], has_vae: bool) -> str:
    """Return Markdown: the commands, and the differences between diffusers and sdit."""
    pipeline = 'custom_pipeline="pipeline", ' if is_plain(config.model) else ""
    paragraphs = [
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER", {pipeline}trust_remote_code=True)\n'
        f"images = pipe({_call(config)}).images\n```",
        "`pipeline.py` in this folder needs only torch and diffusers. sdit need not be installed.",
    ]
    if config.sample.vae is not None and not has_vae:
        paragraphs.append("The folder has no `vae/`. Pass `vae=AutoencoderKL.from_pretrained(...)`.")
    if is_plain(config.model):
        paragraphs += _stock(config, has_vae)
    if differences:
        paragraphs += ["Differences from the run's own sampler:", "\n".join(f"- {text}" for text in differences)]
    return "\n\n".join(paragraphs)


def _call(config: Config) -> str:
    sample, classes = config.sample, config.model.classes
    guidance = sample.guidance if classes else 1.0
    words = [
        f"class_labels=[{', '.join(map(str, range(min(4, classes or 4))))}]",
        f"guidance_scale={guidance:g}",
        f"num_inference_steps={sample.steps}",
    ]
    if sample.guided_channels is not None and guidance != 1:
        words.append(f"guided_channels={sample.guided_channels}")
    interval = sample.guidance_interval
    if tuple(interval) != (0, 1) and guidance != 1:
        words.append(f"guidance_interval=({interval[0]:g}, {interval[1]:g})")
    return ", ".join(words)


def _stock(config: Config, has_vae: bool) -> list[str]:
    """Return in paragraphs how diffusers' own pipeline computes the same function."""
    few = f"takes {STOCK_CLASSES} for the null label, and this model has {config.model.classes} classes"
    is_flow, has_stats = config.diffusion.path == "flow", config.data.latent_stats is not None
    learns_variance = config.sample.sampler == "ddpm" and config.model.learn_variance
    limits = [
        (not has_vae, "needs a VAE, which this folder has not. Pass `vae=AutoencoderKL.from_pretrained(...)`."),
        (config.model.classes != STOCK_CLASSES, f"{few}. Use it only with `guidance_scale=1`."),
        (is_flow, "ends its flow times at 1/T. `pipeline.py` has the times of sdit."),
        (has_stats, "ignores `latents_mean` and `latents_std` of `vae/config.json`. `pipeline.py` uses them."),
        (learns_variance, "ignores the learned variance. `pipeline.py` uses it."),
    ]
    return [
        "diffusers' own pipeline needs one line more. `DiTTransformer2DModel` has other time frequencies than DiT: "
        "10000^(-i/127), not 10000^(-i/128). The line restores them. (`norm_eps` is 1e-6 in `transformer/config.json`, "
        "as in DiT.)",
        "```python\nfrom diffusers import DiTPipeline\n\n"
        f'pipe = DiTPipeline.from_pretrained("THIS_FOLDER")\n{FREQUENCY_LINE}\n```',
        *(f"`DiTPipeline` {limit}" for applies, limit in limits if applies),
    ]
