"""Which models are compared, under which recipes, and at which size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from sdit.errors import ConfigError

HERE = Path(__file__).resolve().parent
SEARCH_SEED = 1000  # none of the seeds that are compared


@dataclass(frozen=True)
class Recipe:
    """What the models of a comparison share. The learning rate is searched on `baseline`, to which all are compared.

    `sampler` with `steps` draws the samples that are scored. heun calls the network twice in each step but the last.
    """

    baseline: str
    sampler: str
    steps: int
    overrides: tuple[str, ...] = ()
    name: str = ""  # part of the names of files and of blocks of the page
    label: str = ""  # for people


@dataclass(frozen=True)
class Variant:
    """A model by its config overrides; `label` is for people.

    `timed_as` names the variant of the very same step, whose time per image holds for this one, too.
    """

    label: str
    overrides: tuple[str, ...]
    recipe: Recipe
    timed_as: str | None = None

    @property
    def full_label(self) -> str:
        """The label with that of the recipe."""
        return f"{self.label}, {self.recipe.label}" if self.recipe.label else self.label


@dataclass(frozen=True)
class Study:
    """A set of models and how large the experiment is. Lengths are in images.

    `groups` holds the names of variants that train in turns; the first group is finished before the next one begins.
    `overrides` change what the config file says. `sampled_images` are scored at the end, the first `curve_images` of them also
    after `scored_after`. `guided_images` are scored at the end with guidance (0: none). `loss_images` held-out images are
    scored at each kept checkpoint (0: only the trainer's held-out loss is known). `pairs` are compared with one another, in
    addition to the comparison of all with the baseline.
    """

    name: str
    config: Path
    folder: Path  # of the page, the plots and results/*.json
    variants: dict[str, Variant]
    groups: tuple[tuple[str, ...], ...]
    learning_rates: tuple[float, ...]
    search_images: int
    turn_images: int
    scored_after: tuple[int, ...]
    sampled_images: int
    curve_images: int
    pairs: tuple[tuple[str, str], ...] = ()
    guided_images: int = 0
    loss_images: int = 0
    clock: str = "cpu"  # or `wall`: which time is compared
    data: str = "fashion-mnist"
    pad: int | None = None
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)

    @cached_property
    def recipes(self) -> list[Recipe]:
        """The recipes of all variants, in their order."""
        return list(dict.fromkeys(variant.recipe for variant in self.variants.values()))

    def only(self, names: Sequence[str]) -> Study:
        """The study with some of its variants. Raises: ConfigError when it has no such variant."""
        for name in names:
            if name not in self.variants:
                raise ConfigError(f"--rows: {name}; legal: {', '.join(self.variants)}")
        groups = tuple(tuple(name for name in group if name in names) for group in self.groups)
        return replace(self, groups=groups)


_DIT = ("model.variant=dit", "prior.weight=0")
_DTR = ("model.variant=dtr", "prior.weight=0")
_SWITCH = ("model.variant=switch", "model.experts.count=3", "model.experts.top_k=2")
_LONGER = (
    "train.images=589824"  # at least as long as Switch-DiT takes: 1.08 to 1.12 x DiT's CPU time per image in seed 0
)

_SHORT = Recipe(baseline="dit", sampler="dpm++2m", steps=10)
_SHORT_VARIANTS = {
    "dit": Variant("DiT", _DIT, _SHORT),
    # As long as Switch-DiT takes: it was timed at 1.12 x DiT's wall-clock per image.
    "dit-longer": Variant("DiT, 1.125 x the images", (*_DIT, "train.images=73728"), _SHORT, timed_as="dit"),
    "dtr": Variant("DTR", _DTR, _SHORT),
    "switch": Variant("Switch-DiT (M = 3, k = 2)", _SWITCH, _SHORT),
    "switch-no-prior": Variant("Switch-DiT without the prior loss", (*_SWITCH, "prior.weight=0"), _SHORT),
    "switch-k1": Variant("Switch-DiT, k = 1", (*_SWITCH, "model.experts.top_k=1"), _SHORT),
    "switch-m8": Variant("Switch-DiT, M = 8", (*_SWITCH, "model.experts.count=8"), _SHORT),
    "switch-mlp": Variant("Switch-DiT, MLP experts", (*_SWITCH, "model.experts.kind=mlp"), _SHORT),
}
SHORT = Study(
    name="short", config=HERE / "convergence.yaml", folder=HERE, pad=32, clock="wall",
    pairs=(("switch", "dit-longer"), ("switch", "switch-no-prior"), ("switch-mlp", "switch")),
    variants=_SHORT_VARIANTS, groups=(tuple(_SHORT_VARIANTS),),
    learning_rates=(2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2), search_images=16_384, turn_images=4_096,
    scored_after=(16_384, 32_768, 49_152), sampled_images=1_000, curve_images=1_000,
)  # fmt: skip

MODERN = Recipe(
    name="modern", label="modern recipe", baseline="modern-dit", sampler="heun", steps=25,
    overrides=(
        "model.norm=rms", "model.ffn=swiglu", "model.qk_norm=rms", "model.rope=true", "model.learn_variance=false",
        "diffusion.path=flow", "diffusion.timestep_sampling=stratified_logit_normal", "diffusion.clip_x0=none",
        "sample.sampler=heun",
    ),
)  # fmt: skip
PAPER = Recipe(
    name="paper", label="recipe of the paper", baseline="paper-dit", sampler="dpm++2m", steps=50,
    overrides=(
        "model.learn_variance=true", "diffusion.schedule=cosine", "diffusion.timestep_sampling=stratified",
        "diffusion.clip_x0=fixed",
    ),
)  # fmt: skip
# Two of the eight experts and the gate cost what the MLP and the switch of a Switch-DiT block cost.
TOKEN_EXPERTS = {
    "modern": "model.moe={experts: 8, top_k: 2, kind: swiglu, hidden_ratio: 1.484375}",
    "paper": "model.moe={experts: 8, top_k: 2, kind: mlp, hidden_ratio: 2.25}",
}
_PAIRS = (
    ("switch", "dit-longer"), ("switch", "dit-wider"), ("switch", "dit-moe"), ("switch", "switch-no-prior"), ("switch", "dtr"),
    ("switch-mlp", "dit-large"),
)  # fmt: skip
_FIRST, _SECOND = slice(0, 3), slice(3, None)


def _rows(recipe: Recipe) -> dict[str, Variant]:
    """The models of the long study under a recipe, the most important ones first."""
    models = {
        "dit": ("DiT", _DIT),
        "switch": ("Switch-DiT (M = 3, k = 2)", _SWITCH),
        "dit-moe": ("DiT-MoE (8 experts, 2 per token)", (*_DIT, TOKEN_EXPERTS[recipe.name])),
        "dit-longer": ("DiT, 1.125 x the images", (*_DIT, _LONGER)),
        "switch-no-prior": ("Switch-DiT without the prior loss", (*_SWITCH, "prior.weight=0")),
        "dtr": ("DTR", _DTR),
        "dit-wider": ("DiT, MLP widened to Switch-DiT's parameters", (*_DIT, "model.mlp_ratio=5.5")),
        "switch-mlp": ("Switch-DiT, MLP experts", (*_SWITCH, "model.experts.kind=mlp")),
        "dit-large": ("DiT of width 96, the FLOPs of MLP experts", (*_DIT, "model.width=96", "model.heads=6")),
    }
    timed_as = {"dit-longer": recipe.baseline}
    return {
        f"{recipe.name}-{name}": Variant(label, (*overrides, *recipe.overrides), recipe, timed_as.get(name))
        for name, (label, overrides) in models.items()
    }


_MODERN_ROWS, _PAPER_ROWS = _rows(MODERN), _rows(PAPER)
LONG = Study(
    name="long", config=HERE / "long.yaml", folder=HERE / "long", variants=_MODERN_ROWS | _PAPER_ROWS,
    groups=tuple(tuple(rows)[part] for rows in (_MODERN_ROWS, _PAPER_ROWS) for part in (_FIRST, _SECOND)),
    pairs=tuple((f"{recipe.name}-{one}", f"{recipe.name}-{other}") for recipe in (MODERN, PAPER) for one, other in _PAIRS),
    learning_rates=(2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2), search_images=65_536, turn_images=65_536,
    scored_after=(65_536, 131_072, 262_144, 393_216), sampled_images=5_000, curve_images=2_000, guided_images=1_000,
    loss_images=10_000,
)  # fmt: skip

STUDIES = {study.name: study for study in (LONG, SHORT)}
QUICK_OVERRIDES = (
    "model.depth=2", "model.width=16", "model.heads=2", "model.patch_size=4", "model.input_size=8",
    "train.images=256", "optimizer.warmup_images=64", "train.global_batch=32", "train.log_every_steps=1",
    "checkpoint.every_images=64", "checkpoint.keep_every_images=128", "validation.every_images=128", "validation.images=64",
    "parallel.compile=false",
)  # fmt: skip


def quick(study: Study) -> Study:
    """The same study with tiny models and few of them, on the digits."""
    names = study.groups[0][:3] if study is LONG else ("dit", "switch")
    return replace(
        study, data="digits", overrides=QUICK_OVERRIDES, pad=None,
        variants={name: study.variants[name] for name in names}, groups=(names,),
        seeds=(0, 1), learning_rates=(1e-3, 2e-3), search_images=64, turn_images=128, scored_after=(128,),
        sampled_images=200, curve_images=100, guided_images=100 if study.guided_images else 0,
        loss_images=200 if study.loss_images else 0,
    )  # fmt: skip
