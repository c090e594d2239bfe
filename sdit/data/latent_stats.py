"""Mean and standard deviation of latents: stored in an index, read from a file, applied before training.

z' = (z - mean) / std * multiplier, where the multiplier is data.latent_scale. Decoding inverts it.
C channels, H = W size. Sources: LightningDiT (arXiv 2501.01423, code), RAE (arXiv 2510.11690, code).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sdit.checked_files import open_regular, parse_json, read_regular
from sdit.data.names import shown
from sdit.errors import ConfigError

VARIANCE_EPSILON = 1e-5  # RAE adds it to a variance
SUFFIXES = (".pt", ".pth", ".npz", ".safetensors", ".json")
MAX_FILE_BYTES = 2**28
JSON_DEPTH = 16
KEY = "data.latent_stats"


class LatentStatistics(BaseModel):
    """The `mean` and `std` of latents, flattened. Their common `shape` (c, h, w) broadcasts to (C, H, W)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    shape: tuple[int, int, int]
    mean: tuple[float, ...] = Field(repr=False)
    std: tuple[float, ...] = Field(repr=False)

    @model_validator(mode="after")
    def _consistent(self) -> LatentStatistics:
        count = int(np.prod(self.shape))
        if min(self.shape) < 1 or len(self.mean) != count or len(self.std) != count:
            raise ValueError(f"shape: {self.shape} does not fit {len(self.mean)} means and {len(self.std)} deviations")
        if min(self.std) <= 0:
            raise ValueError(f"std: {min(self.std)} occurs; legal: more than 0")
        return self

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, (c, h, w) float32 each."""
        mean, std = (np.array(values, np.float32).reshape(self.shape) for values in (self.mean, self.std))
        return mean, std

    @property
    def digest(self) -> str:
        """A sha256 of the float32 values."""
        mean, std = self.arrays
        return hashlib.sha256(repr(self.shape).encode() + mean.tobytes() + std.tobytes()).hexdigest()

    def check_fit(self, channels: int, size: int, where: str) -> None:
        """Check that the statistics broadcast to latents (C, H, W).

        Raises: ConfigError: if they do not. The message names `where`.
        """
        if any(given not in (1, wanted) for given, wanted in zip(self.shape, (channels, size, size), strict=True)):
            raise ConfigError(
                f"{KEY}: {where} has the shape {self.shape}; legal: a shape that broadcasts to {(channels, size, size)}"
            )

    def describe(self) -> str:
        """Return the shape, the first mean and the first deviation in one line."""
        return f"statistics of shape {self.shape} with mean {self.mean[0]:.6g} and std {self.std[0]:.6g} first"


@dataclass(frozen=True)
class LatentScaling:
    """How latents are normalised before training: by `statistics` if there are any, then times `multiplier`."""

    multiplier: float
    statistics: LatentStatistics | None = None

    @cached_property
    def _mean_and_std(self) -> tuple[np.ndarray, np.ndarray] | None:
        return None if self.statistics is None else self.statistics.arrays

    def normalise(self, latents: np.ndarray) -> np.ndarray:
        """Return (z - mean) / std * multiplier of latents z (B, C, H, W) float32."""
        if self._mean_and_std is None:
            return latents * np.float32(self.multiplier)
        mean, std = self._mean_and_std
        normalised: np.ndarray = (latents - mean) / std * np.float32(self.multiplier)
        return normalised

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The fields of an npz of sampled latents that say how to invert it."""
        scale = {"latent_scale": np.asarray(self.multiplier, np.float64)}
        if self.statistics is None:
            return scale
        mean, std = self.statistics.arrays
        return {**scale, "latent_mean": mean, "latent_std": std}

    @property
    def facts(self) -> dict[str, Any]:
        """The multiplier, and a digest of the statistics if there are any, as JSON."""
        digest = {} if self.statistics is None else {"latent_stats_sha256": self.statistics.digest}
        return {"latent_scale": self.multiplier, **digest}


def latent_statistics(mean: np.ndarray, std: np.ndarray) -> LatentStatistics:
    """Return the statistics of arrays of (C,), (h, w), (c, h, w) or (1, c, h, w) numbers.

    Raises: ValueError: if their shapes do not fit, or a number is not finite or not positive.
    """
    both = np.broadcast_arrays(_three_axes(mean), _three_axes(std))
    mean_32, std_32 = (np.asarray(each, np.float64).astype(np.float32) for each in both)
    channels, height, width = mean_32.shape
    means, deviations = tuple(mean_32.ravel().tolist()), tuple(std_32.ravel().tolist())
    return LatentStatistics(shape=(channels, height, width), mean=means, std=deviations)


def _three_axes(values: np.ndarray) -> np.ndarray:
    while values.ndim > 3 and values.shape[0] == 1:
        values = values[0]
    if values.ndim > 3 or values.dtype.kind not in "fiu":
        raise ValueError(f"an array of shape {values.shape} and type {values.dtype}")
    return values.reshape(-1, 1, 1) if values.ndim < 2 else values.reshape((1,) * (3 - values.ndim) + values.shape)


def read_latent_stats(path: Path) -> LatentStatistics:
    """Return the statistics in a file of `mean` and `std`, or of `mean` and `var`.

    A .json file may also be the index of a prepared folder. Of a .pt file no code is run.

    Raises: ConfigError: if the file cannot be read. The message names the key, the file and what is legal.
    """
    try:
        arrays = _arrays(path)
        mean = np.asarray(arrays["mean"], np.float64)
        if "std" in arrays:
            std = np.asarray(arrays["std"], np.float64)
        else:
            with np.errstate(invalid="ignore"):  # a negative variance gives NaN, which is refused below
                std = np.sqrt(np.asarray(arrays["var"], np.float64) + VARIANCE_EPSILON)
        return latent_statistics(mean, std)
    except OSError as error:
        raise ConfigError(f"{KEY}: {shown(path)}: {error.strerror}; legal: {_LEGAL}") from None
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{KEY}: {shown(path)}: {reason}; legal: finite numbers, deviations above 0") from None
    except Exception as error:  # the readers raise almost anything on hostile bytes
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ConfigError(f"{KEY}: {shown(path)}: cannot be read ({reason}); legal: {_LEGAL}") from None


_LEGAL = f"index, or a file of mean and std (or var) that ends in {', '.join(SUFFIXES)}"


def _arrays(path: Path) -> Mapping[str, Any]:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"ends in {path.suffix!r}")
    with open_regular(path) as file:
        if file.seek(0, 2) > MAX_FILE_BYTES:
            raise ValueError(f"has more than {MAX_FILE_BYTES} bytes")
    if path.suffix == ".json":
        value = parse_json(read_regular(path), str(path), "JSON", JSON_DEPTH)
        if not isinstance(value, dict) or "facts" not in value:
            return value
        mean, std = LatentStatistics.model_validate(value["facts"]["latent_stats"]).arrays
        return {"mean": mean, "std": std}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # not of numpy, which has no bfloat16

        tensors = load_file(path)
    else:
        from sdit.pickles import load_tensors

        tensors = load_tensors(path)
    return {name: tensors[name].detach().double().numpy() for name in ("mean", "std", "var") if name in tensors}
