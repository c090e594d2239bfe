"""What a step sums over all ranks, in one collective: losses, gradient norm, flags, traffic, losses by timestep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdit.train.rank_work import BUCKETS
from sdit.train.record import BINS
from sdit.transfers import Download, upload

PARTS = ("loss", "mse", "vlb", "prior_loss", "balance_loss", "direction_loss", "contrastive_loss")
FLAGS = ("stop", "bad_samples", "written", "failed", "committed", "tokens", "weights", "samples", "waited_seconds")


@dataclass(frozen=True)
class StepSums:
    """Sums over the ranks: `parts` in the order of PARTS, `flags` by name, `bins` (2, BINS) on the host.

    `tokens` are summed `token_figures`, empty without token-routed experts. `work` (2, BUCKETS) are summed `work_share`, on
    logged steps only.
    """

    parts: list[float]
    squared_norm: float
    flags: dict[str, float]
    bins: Tensor
    tokens: Tensor
    work: Tensor | None = None

    @property
    def grad_norm(self) -> float:
        return self.squared_norm**0.5 if self.squared_norm >= 0 else float("nan")

    def traffic(self, world: int) -> dict[str, Any]:
        """The exchange keys of metrics.jsonl."""
        flags = self.flags
        return {
            "exchange_bytes": flags["tokens"] + flags["weights"] + flags["samples"],
            "exchange_bytes_tokens": flags["tokens"],
            "exchange_bytes_weights": flags["weights"],
            "exchange_wait_seconds": flags["waited_seconds"] / world,
        }


def host_share(flags: tuple[float, ...], work: Tensor | None = None) -> Tensor:
    """What this rank adds from its host: `flags` in the order of FLAGS, and on logged steps `work_share`."""
    assert len(flags) == len(FLAGS)
    values = torch.tensor(flags, dtype=torch.float64)
    return values if work is None else torch.cat([values, work.flatten()])


def pack(parts: Tensor, squared_norm: Tensor, host: Tensor, bins: Tensor, tokens: Tensor | None = None) -> Tensor:
    """One float64 vector of this rank's share; `host` is `host_share`."""
    share = [parts, squared_norm[None], bins.flatten(), upload(host, parts.device)]
    return torch.cat(share if tokens is None else [*share, tokens])


def unpack(summed: Tensor, has_work: bool = False) -> StepSums:
    """The sums from the vector summed over the ranks. The host waits for them, once a step."""
    host = Download(summed).wait()
    sizes = [len(PARTS), 1, 2 * BINS, len(FLAGS), 2 * BUCKETS * has_work]
    parts, norm, bins, flags, work, tokens = host.split([*sizes, len(host) - sum(sizes)])
    by_name = dict(zip(FLAGS, flags.tolist(), strict=True))
    by_bucket = work.view(2, BUCKETS) if has_work else None
    return StepSums(parts.tolist(), norm.item(), by_name, bins.view(2, BINS), tokens, by_bucket)


def timestep_bins(t: Tensor, timesteps: int) -> Tensor:
    """(B,) int64: the part of the time axis, 0..BINS-1, of t (B,) in 0..T-1, or in [0, 1) if it is continuous."""
    position = t.double() if t.is_floating_point() else t.double() / timesteps
    return (position * BINS).long().clamp_(0, BINS - 1)


def bin_sums(values: Tensor, bins: Tensor) -> Tensor:
    """(2, BINS) float64: sum and count of `values` (B,) in each of the `timestep_bins` (B,)."""
    found = values.detach().double()
    sums = torch.zeros(2, BINS, dtype=torch.float64, device=values.device)
    return sums.index_add_(1, bins, torch.stack([found, torch.ones_like(found)]))


def bin_means(sums: Tensor) -> list[float | None]:
    """Mean of each bin of `sums` (2, BINS); None where no sample fell."""
    totals, counts = sums.tolist()
    return [total / count if count else None for total, count in zip(totals, counts, strict=True)]
