"""`save_pretrained`, `from_pretrained` and `push_to_hub` of the model, by huggingface_hub's mixin, without pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, ModelHubMixin

CARD = """\
---
{{ card_data }}
---
# {{ title }}

{{ summary }}

## Use

{{ usage | default("`DiffusionTransformer.from_pretrained` of sdit.model reads this folder.", true) }}

## Data

{{ data | default("The training data are unknown.", true) }}

## Recipe

{{ recipe | default("The recipe is unknown.", true) }}

## Scores

{{ scores | default("No score is known.", true) }}

## Code

{{ commit | default("The commit is unknown.", true) }}
"""
NAMES = {"switch": "Switch-DiT", "dtr": "DTR", "dit": "DiT"}
PAPERS = {"switch": "2403.09176", "dtr": "2310.07138", "dit": "2212.09748"}


class Pretrained(ModelHubMixin, library_name="sdit", tags=["image-generation", "diffusion"], model_card_template=CARD):
    """Folders with model.safetensors (or several files and an index), config.json and a model card.

    config.json holds the section `model` of the config. The weights have their published names.
    """

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """Return the model of a folder or of a Hub id, in eval mode, in float32 on the CPU.

        The options are those of `huggingface_hub.snapshot_download`. They have no effect on a folder.

        Raises:
            CheckpointError: if a file is missing or damaged, or the download fails. The message names it.
            ConfigError: if config.json is not legal, or the weights do not fit it.
        """
        from sdit.interop.pretrained import load_pretrained, pretrained_folder

        folder = pretrained_folder(
            pretrained_model_name_or_path, revision=revision, token=token, cache_dir=cache_dir,
            force_download=force_download, local_files_only=local_files_only,
        )  # fmt: skip
        return load_pretrained(folder, cls)

    def _save_pretrained(self, save_directory: Path) -> None:
        from sdit.interop.pretrained import write_pretrained

        write_pretrained(self, save_directory)  # type: ignore[arg-type]

    def generate_model_card(self, *args: Any, **facts: str) -> ModelCard:
        """Return the model card.

        `facts` are texts of its sections `usage`, `data`, `recipe`, `scores` and `commit`, and `trained`, which ends the summary.
        """
        config = self.config  # type: ignore[attr-defined]
        name, paper = NAMES[config.variant], PAPERS[config.variant]
        count = sum(parameter.numel() for parameter in self.parameters())  # type: ignore[attr-defined]
        link = f"[arXiv {paper}](https://arxiv.org/abs/{paper})"
        title = f"{name}, {config.input_size}x{config.input_size}x{config.channels}"
        summary = f"A {name} ({link}) of {count:,} parameters. {facts.pop('trained', '')}".strip()
        return super().generate_model_card(title=title, summary=summary, **facts)
