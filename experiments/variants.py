"""Which models are compared, and at which scale."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CONFIG = Path(__file__).with_name("convergence.yaml")
BASELINE = "dit"
SEARCH_SEED = 1000  # none of the seeds that are compared


@dataclass(frozen=True)
class Variant:
    """A model by its config overrides; `label` is for people.

    `timed_as` names the variant of the very same step, whose time per image holds for this one, too.
    """

    label: str
    overrides: tuple[str, ...]
    timed_as: str | None = None


def _switch(label: str, *overrides: str) -> Variant:
    return Variant(label, ("model.variant=switch", *overrides))


VARIANTS = {
    "dit": Variant("DiT", ("model.variant=dit", "prior.weight=0")),
    # As long as Switch-DiT takes: it was timed at 1.12 x DiT's wall-clock per image.
    "dit-longer": Variant(
        "DiT, 1.125 x the images", ("model.variant=dit", "prior.weight=0", "train.images=73728"), timed_as="dit"
    ),
    "dtr": Variant("DTR", ("model.variant=dtr", "prior.weight=0")),
    "switch": _switch("Switch-DiT (M = 3, k = 2)", "model.experts.count=3", "model.experts.top_k=2"),
    "switch-no-prior": _switch("Switch-DiT without the prior loss", "model.experts.count=3", "prior.weight=0"),
    "switch-k1": _switch("Switch-DiT, k = 1", "model.experts.count=3", "model.experts.top_k=1"),
    "switch-m8": _switch("Switch-DiT, M = 8", "model.experts.count=8", "model.experts.top_k=2"),
    "switch-mlp": _switch("Switch-DiT, MLP experts", "model.experts.count=3", "model.experts.kind=mlp"),
}

_EXPERTS = ("model.experts.count=3", "model.experts.top_k=2")
RECIPES = {  # of experiments/recipes.py
    "recipe-paper": _switch("Switch-DiT, recipe of the paper", *_EXPERTS),
    "recipe-modern": _switch(
        "Switch-DiT, modern recipe", *_EXPERTS, "model.norm=rms", "model.ffn=swiglu", "model.qk_norm=rms", "model.rope=true",
        "model.learn_variance=false", "diffusion.path=flow", "diffusion.timestep_sampling=stratified_logit_normal",
        "diffusion.clip_x0=none", "diffusion.direction_weight=1", "sample.sampler=heun",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How large the experiment is. `overrides` change what convergence.yaml says; lengths are in images."""

    data: str = "fashion-mnist"
    overrides: tuple[str, ...] = ()
    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    search_images: int = 16_384
    sampled_images: int = 1_000
    sampler_steps: int = 10
    scored_after: tuple[int, ...] = (16_384, 32_768, 49_152)  # checkpoints that are kept and scored, beside the end
    turn_images: int = 4_096  # trained of one variant before the next has its turn


FULL = Scale()
QUICK = Scale(
    data="digits",
    overrides=(
        "model.depth=2", "model.width=16", "model.heads=2", "model.patch_size=4", "model.input_size=8",
        "train.images=256", "optimizer.warmup_images=64", "train.log_every_steps=1", "checkpoint.every_images=64",
        "checkpoint.keep_every_images=128", "validation.every_images=128", "validation.images=64",
    ),
    variants=("dit", "switch"), seeds=(0, 1), learning_rates=(1e-3, 2e-3), search_images=64,
    sampled_images=200, sampler_steps=2, scored_after=(128,), turn_images=128,
)  # fmt: skip
