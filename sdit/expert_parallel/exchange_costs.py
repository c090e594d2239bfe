"""What `parallel.exchange: auto` minimises in a run: bytes, or seconds by the speeds of the expert group.

P ranks per group, B samples of a rank and micro-step, L tokens, D width, N columns of an expert's first product.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from sdit.config import ModelConfig, ParallelConfig
from sdit.distributed.comm import Comm
from sdit.distributed.fabric import GROUP_BYTES, median_seconds
from sdit.expert_parallel.all_to_all import ExpertGroup, begin_replicate
from sdit.expert_parallel.traffic_model import Speeds, UnitCosts, unit_costs

SMALL_BYTES = 8  # of a transfer that takes the fixed time only
PRODUCTS = 8  # samples of the product that is measured


class ExchangeCosts:
    """The unit costs of a run. Measured speeds are kept in the checkpoints, so that a resumed run decides alike."""

    def __init__(
        self, model: ModelConfig, parallel: ParallelConfig, comm: Comm, group: ExpertGroup, dtype: torch.dtype
    ) -> None:
        self._model, self._comm, self._group, self._dtype = model, comm, group, dtype
        self._unit_costs = unit_costs(model, parallel, dtype.itemsize, group.ranks)
        kind = parallel.exchange_costs
        wanted = kind == "measured" or (kind == "auto" and comm.device.type == "cuda")
        self._is_measured = wanted and parallel.exchange == "auto" and group.ranks > 1

    def unit_costs(self) -> UnitCosts:
        """Return the unit costs. The first call in a run measures the speeds if the config asks for it, on all ranks."""
        if self._is_measured and self._unit_costs.speeds is None:
            speeds = measure_speeds(self._comm, self._group, self._model, self._dtype)
            self._unit_costs = replace(self._unit_costs, speeds=speeds)
            if self._comm.is_first:
                logging.getLogger(__name__).info(describe(speeds))
        return self._unit_costs

    def stored(self) -> dict[str, float] | None:
        """Return the measured speeds as a checkpoint carries them, or None."""
        speeds = self._unit_costs.speeds
        return asdict(speeds) if self._is_measured and speeds is not None else None

    def restore(self, stored: dict[str, float]) -> None:
        """Use the speeds that an earlier process of the run has measured."""
        if self._is_measured:
            self._unit_costs = replace(self._unit_costs, speeds=Speeds(**stored))


def measure_speeds(comm: Comm, group: ExpertGroup, model: ModelConfig, dtype: torch.dtype) -> Speeds:
    """Return the speeds of the slowest rank, on all ranks. All groups measure at the same time, as they send in a step."""
    ranks = group.ranks
    large = GROUP_BYTES // ranks

    def all_to_all(row_bytes: int) -> Callable[[], None]:
        rows = torch.zeros(ranks, row_bytes, dtype=torch.uint8, device=comm.device)
        return lambda: group.wait(group.send(rows, [1] * ranks, [1] * ranks, "tokens")[1])

    weights = torch.zeros(1, large, dtype=torch.uint8, device=comm.device)
    with torch.no_grad():
        seconds = [
            median_seconds(comm, all_to_all(SMALL_BYTES)),
            median_seconds(comm, all_to_all(large)),
            median_seconds(comm, lambda: begin_replicate(group, weights, [1] * ranks).wait()),
            median_seconds(comm, (product := _expert_product(model, dtype, comm.device))[0]),
        ]
    group.traffic.forget()
    slowest = comm.largest(torch.tensor(seconds, dtype=torch.float64, device=comm.device))
    fixed, exchange, gather, compute = slowest.tolist()
    sent_bytes = (ranks - 1) * large
    return Speeds(
        all_to_all_bytes_per_second=sent_bytes / without_fixed(exchange, fixed),
        gather_bytes_per_second=sent_bytes / without_fixed(gather, fixed),
        flops_per_second=product[1] / compute,
        transfer_seconds=fixed,
    )


def without_fixed(seconds: float, fixed_seconds: float) -> float:
    """Return the part of a transfer's seconds that grows with its bytes. At least half is counted as such, for noise."""
    return max(seconds - fixed_seconds, seconds / 2)


def describe(speeds: Speeds) -> str:
    """Return the speeds in one line, for the log."""
    return (
        f"exchange costs: all-to-all {speeds.all_to_all_bytes_per_second / 1e9:.2f} GB/s and gather "
        f"{speeds.gather_bytes_per_second / 1e9:.2f} GB/s per rank, experts {speeds.flops_per_second / 1e12:.3f} TFLOP/s, "
        f"{1e6 * speeds.transfer_seconds:.0f} us per transfer"
    )


def _expert_product(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], Any], float]:
    """Return the first product of experts for a few samples, (B, L, D) x (B, D, N), and its FLOPs."""
    width, experts, moe = model.width, model.experts, model.moe
    columns = width if experts.kind == "linear" else experts.hidden(width)
    if model.variant != "switch" and moe is not None:
        columns = moe.hidden(width)
    rows = torch.zeros(PRODUCTS, model.tokens, width, dtype=dtype, device=device)
    weights = torch.zeros(PRODUCTS, width, columns, dtype=dtype, device=device)
    return lambda: torch.bmm(rows, weights), 2.0 * PRODUCTS * model.tokens * width * columns
