"""Exports a checkpoint as a folder: for `DiffusionTransformer.from_pretrained`, or for diffusers' pipelines."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdit.checkpoint.diffusers_readme import diffusers_usage
from sdit.checkpoint.export import export_safetensors, file_facts, narrowed, tensor_entry, write_safetensors
from sdit.checkpoint.load import Trained, Weights, describe_trained, load_model
from sdit.checkpoint.model_card import model_card
from sdit.config import Config
from sdit.contracts import Progress
from sdit.data.encoders import latent_encoder
from sdit.errors import CheckpointError, ConfigError
from sdit.files import new_folder
from sdit.interop.diffusers_config import CUSTOM_CLASS, diffusers_config, is_plain
from sdit.interop.diffusers_names import to_diffusers_names
from sdit.interop.pretrained import WEIGHTS as PRETRAINED_WEIGHTS
from sdit.interop.pretrained import write_model_config
from sdit.interop.schedulers import scheduler_config
from sdit.safetensors_file import TensorEntry

DIFFUSERS = "0.42.1"  # the version that the files were tested with
PIPELINE, TRANSFORMER = "pipeline", "sdit_transformer"  # modules in `sdit/interop/diffusers_files`
WEIGHTS = "diffusion_pytorch_model.safetensors"
PRETRAINED_USAGE = """\
```python
from sdit.model import DiffusionTransformer

model = DiffusionTransformer.from_pretrained("THIS_FOLDER_OR_HUB_ID")
```

`sdit sample --checkpoint model.safetensors --out grid.png` draws images."""

_log = logging.getLogger(__name__)


def export_pretrained(
    checkpoint: Path, out: Path, weights: Weights, dtype: torch.dtype, progress: Progress | None = None
) -> dict[str, str]:
    """Write the folder that `DiffusionTransformer.from_pretrained` reads, and return the metadata of its weights.

    The folder `out` holds model.safetensors, config.json (the section `model`) and README.md (the model card).

    Raises:
        CheckpointError: if the checkpoint cannot be read, or `out` cannot be written or is not empty.
        ConfigError: if the model of the checkpoint's config cannot be built.
    """
    trained = describe_trained(checkpoint)
    with _exported(out) as folder:
        facts = export_safetensors(trained.origin, folder / PRETRAINED_WEIGHTS, weights, dtype, progress)
        write_model_config(folder, trained.config.model)
        _write_card(folder, trained, weights, PRETRAINED_USAGE, "sdit")
    return facts


def export_diffusers(
    checkpoint: Path, out: Path, weights: Weights, dtype: torch.dtype, vae: Path | None = None
) -> tuple[dict[str, str], list[str]]:
    """Write the folder that diffusers' pipelines read.

    Return facts about the weights, and how the sampler of the folder differs from the run's, one sentence each.

    `vae` is the folder of the AutoencoderKL to copy (None: that of `sample.vae`, if it exists). The whole model is in memory.

    Raises:
        CheckpointError: if the checkpoint cannot be read, or `out` cannot be written or is not empty.
        ConfigError: if diffusers has no form for the model, or the VAE does not fit.
    """
    trained = load_model(checkpoint, weights)
    config = trained.config
    transformer = diffusers_config(config.model)
    scheduler, differences = scheduler_config(config.diffusion, config.sample, config.model.timesteps)
    source = _vae_folder(config, vae)
    with _exported(out) as folder:
        for name in ("transformer", "scheduler"):
            (folder / name).mkdir()
        _write_json(folder / "transformer" / "config.json", {**transformer, "_diffusers_version": DIFFUSERS})
        _write_weights(folder / "transformer" / WEIGHTS, trained, dtype)
        _write_json(folder / "scheduler" / "scheduler_config.json", {**scheduler, "_diffusers_version": DIFFUSERS})
        if source is not None:
            _copy_vae(source, folder / "vae", _latent_config(trained))
        _copy_module(PIPELINE, folder)
        if transformer["_class_name"] == CUSTOM_CLASS:
            _copy_module(TRANSFORMER, folder / "transformer")
        _write_json(folder / "model_index.json", _index(trained, transformer, scheduler, source is not None))
        usage = diffusers_usage(config, differences, source is not None)
        _write_card(folder, trained, weights, usage, "diffusers")
    return file_facts(config, trained.clock, weights, trained.data), differences


@contextmanager
def _exported(out: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `out`.

    Raises: CheckpointError: if `out` is not a new or an empty folder, or cannot be written.
    """
    try:
        with new_folder(out) as folder:
            yield folder
    except FileExistsError as error:
        raise CheckpointError(f"{out}: {error.strerror}") from None
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror or error})") from None


def _write_weights(path: Path, trained: Trained, dtype: torch.dtype) -> None:
    """Write the parameters under the names that the transformer's class has."""
    tensors = {name: parameter.detach() for name, parameter in trained.model.named_parameters()}
    if is_plain(trained.config.model):
        tensors = to_diffusers_names(tensors)

    def entry(name: str, value: Tensor) -> TensorEntry:
        return tensor_entry(name, dtype, value.shape, lambda: iter([narrowed(name, value, dtype)]))

    write_safetensors(path, [entry(name, value) for name, value in tensors.items()], {"format": "pt"})


def _index(
    trained: Trained, transformer: Mapping[str, Any], scheduler: Mapping[str, Any], has_vae: bool
) -> dict[str, Any]:
    """Return model_index.json. A plain DiT is a DiTPipeline; the others name the pipeline in the folder."""
    is_custom = transformer["_class_name"] == CUSTOM_CLASS
    names = {str(label): name for label, name in enumerate(trained.classes.names)}
    return {
        "_class_name": [PIPELINE, "SditPipeline"] if is_custom else "DiTPipeline",
        "_diffusers_version": DIFFUSERS,
        **({"id2label": names} if names else {}),
        "transformer": [TRANSFORMER if is_custom else "diffusers", transformer["_class_name"]],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "vae": ["diffusers", "AutoencoderKL"] if has_vae else [None, None],
    }


def _vae_folder(config: Config, vae: Path | None) -> Path | None:
    """Return the folder of the VAE to copy, None if there is none.

    Raises: ConfigError: if the folder `vae` does not hold a VAE that fits the model.
    """
    folder = vae or (Path(config.sample.vae) if config.sample.vae else None)
    if folder is None:
        return None
    if vae is None and not folder.is_dir():
        _log.warning("sample.vae: %s is not a folder; the exported folder has no vae/", folder)
        return None
    channels = latent_encoder(folder, mirrored=False, dtype="float32", batch=1, device="cpu").channels
    if channels != config.model.channels:
        raise ConfigError(f"--vae: {folder} has {channels} latent channels; legal: {config.model.channels}")
    return folder


def _latent_config(trained: Trained) -> dict[str, Any]:
    """Return the keys of the VAE's config that say how the latents were normalised that the model was trained on."""
    values: dict[str, Any] = {"scaling_factor": trained.config.data.latent_scale}
    statistics = None if trained.data is None else trained.data.latent_stats
    if statistics is not None:
        for key, array in zip(("latents_mean", "latents_std"), statistics.arrays, strict=True):
            is_per_channel = array.shape[1:] == (1, 1)
            values[key] = (array.reshape(-1) if is_per_channel else array).tolist()
    return values


def _copy_vae(source: Path, folder: Path, latents: Mapping[str, Any]) -> None:
    """Copy the VAE. Its config says how the latents of this model are normalised."""
    folder.mkdir()
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    _write_json(folder / "config.json", {**values, **latents})
    shutil.copyfile(source / WEIGHTS, folder / WEIGHTS)


def _copy_module(name: str, folder: Path) -> None:
    text = resources.files("sdit.interop.diffusers_files").joinpath(f"{name}.py").read_text(encoding="utf-8")
    (folder / f"{name}.py").write_text(text, encoding="utf-8")


def _write_card(folder: Path, trained: Trained, weights: Weights, usage: str, library: str) -> None:
    card = trained.model.generate_model_card(usage=usage, **model_card(trained, weights))
    card.data["library_name"] = library
    card.save(folder / "README.md")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
