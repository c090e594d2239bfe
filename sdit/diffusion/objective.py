"""The training loss of a batch: add noise to the images, run the model, weight the errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from sdit.config import DiffusionConfig, describe_error
from sdit.contracts import LossParts
from sdit.diffusion.losses import (
    ConstantWeight,
    UncertaintyWeight,
    decoder_bits,
    direction_loss,
    kl_bits,
    make_weighting,
)
from sdit.diffusion.prediction import learned_log_variance, split_variance, target_of, x0_slope
from sdit.diffusion.schedule import DeviceTables, make_schedule
from sdit.errors import ConfigError
from sdit.time_law import TimeLaw

Model = Callable[[Tensor, Tensor, Tensor], Any]  # (x_t, t, y) -> prediction, or an object with `.prediction`


class Objective(nn.Module, ABC):
    """Per-sample losses of a model. Its only parameters are those of a learned weighting."""

    def __init__(self, config: DiffusionConfig, timesteps: int | None) -> None:
        super().__init__()
        self.config, self.time_law = config, TimeLaw.of(config)
        self.timesteps = timesteps  # T; None: t is continuous in [0, 1]

    @abstractmethod
    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return the noisy images x_t (B, C, H, W) float32."""

    @abstractmethod
    def _losses(self, output: Any, x0: Tensor, t: Tensor, noise: Tensor, other_target: Tensor | None) -> LossParts:
        """Return the losses (B,) of the model's output for x_t."""

    def forward(
        self, model: Model, x0: Tensor, t: Tensor, y: Tensor, noise: Tensor | None = None,
        other_target: Tensor | None = None,
    ) -> LossParts:  # fmt: skip
        """Return the losses (B,) of clean images `x0` (B, C, H, W) at `t` (B,) with labels `y` (B,).

        `t` are int64 timesteps, or times in [0, 1] on the flow path. `noise` (B, C, H, W) None: it is drawn here.
        `other_target` (B, C, H, W) is the target of the sample before each in the global batch, for the contrastive loss of
        the flow path. None: the batch is the global batch.
        """
        x0 = x0.float()
        noise = torch.randn_like(x0) if noise is None else noise.float()
        t = t.float() if self.timesteps is None else t
        return self._losses(model(self.q_sample(x0, t, noise), t, y), x0, t, noise, other_target)

    def draw_timesteps(self, seed: int, first_index: int, global_batch: int) -> np.ndarray:
        """Return t (global_batch,) of all samples of a step: int64 in 0..T-1, or float32 in [0, 1) on the flow path."""
        return self.time_law.draw(seed, first_index, global_batch, self.timesteps)


class DiffusionObjective(Objective):
    """Squared error of epsilon, x0 or v. If the variance is learned, the variational bound is added (IDDPM, eq. 16)."""

    def __init__(self, config: DiffusionConfig, timesteps: int) -> None:
        super().__init__(config, timesteps)
        schedule = make_schedule(config.schedule, timesteps)
        self.weighting = make_weighting(config, schedule.snr)
        self._mixing = DeviceTables(schedule.alpha, schedule.sigma)
        self._reverse = DeviceTables(schedule.posterior_x0, schedule.log_variance_low, schedule.log_variance_high)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t = alpha_t x0 + sigma_t noise, (B, C, H, W) float32 (DDPM, eq. 4)."""
        alpha, sigma = _per_image(self._mixing.at(t))
        return alpha * x0.float() + sigma * noise.float()

    def _losses(self, output: Any, x0: Tensor, t: Tensor, noise: Tensor, other_target: Tensor | None) -> LossParts:
        prediction, variance = split_variance(_prediction(output), x0.shape[1])
        alpha, sigma = _per_image(self._mixing.at(t))
        error = prediction.float() - target_of(self.config.prediction, x0, noise, alpha, sigma)
        mse = self.weighting(_image_mean(error.square()), t)
        if variance is None:
            vlb = torch.zeros_like(mse)
        else:
            x0_error = x0_slope(self.config.prediction, alpha, sigma) * error.detach()
            vlb = self._bound(x0, x0_error, variance.float(), t)
        return LossParts(mse, vlb, mse + vlb, output)

    def _bound(self, x0: Tensor, x0_error: Tensor, variance: Tensor, t: Tensor) -> Tensor:
        """Return the bound's term (B,) at each t, in bits per element times T / 1000.

        Its gradient reaches only the variance.
        """
        posterior_x0, low, high = _per_image(self._reverse.at(t))
        log_variance = learned_log_variance(variance, low, high)
        divergence = _image_mean(kl_bits(x0_error, posterior_x0, low, log_variance))
        reconstruction = _image_mean(decoder_bits(x0, x0_error, log_variance))
        assert self.timesteps is not None
        return torch.where(t == 0, reconstruction, divergence) * (self.timesteps / 1000)


class FlowObjective(Objective):
    """Squared error of the velocity v = noise - x0 on the straight path from data (t = 0) to noise (t = 1).

    Two terms can be added: the direction of the velocity (LightningDiT), and contrastive flow matching.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__(config, timesteps=None)
        uncertainty = config.weighting == "uw"
        self.weighting = UncertaintyWeight(config.uw_clusters, None) if uncertainty else ConstantWeight()

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t = (1 - t) x0 + t noise, (B, C, H, W) float32 (rectified flow, eq. 1)."""
        (t,) = _per_image((t.float(),))
        return (1 - t) * x0.float() + t * noise.float()

    def _losses(self, output: Any, x0: Tensor, t: Tensor, noise: Tensor, other_target: Tensor | None) -> LossParts:
        velocity, variance = split_variance(_prediction(output), x0.shape[1])
        if variance is not None:
            raise ConfigError("model.learn_variance: true has no meaning with diffusion.path flow; legal: false")
        velocity, target = velocity.float(), noise - x0
        loss = mse = self.weighting(_image_mean((velocity - target).square()), t)
        direction = contrastive = None
        if self.config.direction_weight:
            direction = direction_loss(velocity, target)
            loss = loss + self.config.direction_weight * direction
        if self.config.contrastive_weight:
            other = target.roll(1, 0) if other_target is None else other_target
            contrastive = _image_mean((velocity - other).square())  # contrastive flow matching, eq. 5
            loss = loss - self.config.contrastive_weight * contrastive
        return LossParts(mse, torch.zeros_like(mse), loss, output, direction, contrastive)


def build_objective(config: DiffusionConfig | Mapping[str, Any], timesteps: int = 1000) -> Objective:
    """Return the objective of a config section, or of a mapping of its keys that may also hold `timesteps` (T).

    Raises: ConfigError: if a key has an illegal value.
    """
    if not isinstance(config, DiffusionConfig):
        keys = dict(config)
        timesteps = keys.pop("timesteps", timesteps)
        try:
            config = DiffusionConfig(**keys)
        except ValidationError as error:
            raise ConfigError(f"diffusion.{describe_error(error, DiffusionConfig)}") from None
    return FlowObjective(config) if config.path == "flow" else DiffusionObjective(config, timesteps)


def _prediction(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.prediction


def _per_image(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Reshape each (B,) to (B, 1, 1, 1)."""
    return tuple(value[:, None, None, None] for value in values)


def _image_mean(values: Tensor) -> Tensor:
    """Return the mean (B,) over C, H and W."""
    return values.flatten(1).mean(1)
