"""Measures the device of each rank, while all ranks measure: matrix products, a transformer's passes, memory."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from sdit.config import ModelConfig
from sdit.distributed.comm import Comm
from sdit.distributed.fabric import median_seconds
from sdit.model import build_model, init_weights
from sdit.model.flops import flops_per_image
from sdit.planner.hardware import Device
from sdit.planner.memory import DeviceKind
from sdit.planner.time_formulas import compute_seconds

GIGA, TERA, GIB = 1e9, 1e12, 2**30


class Sizes(NamedTuple):
    """What is measured on a kind of device: rows of square matrices (fp32, bf16), bytes of a copy, and passes of a DiT.

    The DiT has `depth` blocks of each of the `widths`, and computes `batch` images of `input_size`^2 / 4 tokens.
    """

    rows: tuple[int, int]
    copy_bytes: int
    widths: tuple[int, ...]
    depth: int
    batch: int
    input_size: int


SIZES: dict[DeviceKind, Sizes] = {  # a CPU without bf16 units needs 40 times as long for a product in bf16
    "cpu": Sizes((768, 192), 1 << 26, (128, 256, 384), 2, 8, 16),
    "cuda": Sizes((8192, 8192), 1 << 30, (384, 768, 1152), 4, 64, 32),
}


def measure_device(comm: Comm) -> Device:
    """Return the figures of a rank's device, the mean over the ranks.

    The utilization is measured with fp32 on a CPU and with bf16 on a GPU.
    """
    kind: DeviceKind = "cuda" if comm.device.type == "cuda" else "cpu"
    sizes = SIZES[kind]
    fp32, bf16 = (
        2 * rows**3 / _mean_seconds(comm, _product(comm, rows, dtype))
        for rows, dtype in zip(sizes.rows, (torch.float32, torch.bfloat16), strict=True)
    )
    dtype, peak = (torch.bfloat16, bf16) if kind == "cuda" else (torch.float32, fp32)
    mfu = {width: _utilization(comm, sizes, width, dtype, peak) for width in sizes.widths}
    source = torch.zeros(sizes.copy_bytes, dtype=torch.uint8, device=comm.device)
    other = torch.zeros_like(source)
    on_host = torch.zeros(sizes.copy_bytes, dtype=torch.uint8, pin_memory=kind == "cuda")
    return Device(
        kind=kind,
        fp32_teraflops=fp32 / TERA,
        bf16_teraflops=bf16 / TERA,
        mfu=mfu,
        memory_gib=_memory_bytes(comm) / GIB,
        memory_gigabytes_per_second=2 * sizes.copy_bytes / _mean_seconds(comm, lambda: other.copy_(source)) / GIGA,
        host_copy_gigabytes_per_second=sizes.copy_bytes / _mean_seconds(comm, lambda: on_host.copy_(source)) / GIGA,
    )


def _product(comm: Comm, rows: int, dtype: torch.dtype) -> Callable[[], Any]:
    left, right = (torch.full((rows, rows), 0.5, dtype=dtype, device=comm.device) for _ in range(2))
    return lambda: left @ right


def _utilization(comm: Comm, sizes: Sizes, width: int, dtype: torch.dtype, peak: float) -> float:
    """Return model FLOPs of forward and backward passes over the peak, at most 1."""
    config = ModelConfig(
        variant="dit", depth=sizes.depth, width=width, heads=width // 64, patch_size=2, input_size=sizes.input_size
    )
    model = build_model(config)
    init_weights(model, 0)
    model = model.to(comm.device, dtype).train()
    x = torch.randn(sizes.batch, config.channels, config.input_size, config.input_size).to(comm.device, dtype)
    times, labels = (torch.arange(sizes.batch, device=comm.device) for _ in range(2))

    def passes() -> None:
        model(x, times, labels).prediction.square().mean().backward()

    flops = sizes.batch * flops_per_image(config).train
    return min(1.0, compute_seconds(flops, peak, 1.0) / _mean_seconds(comm, passes))


def _mean_seconds(comm: Comm, work: Callable[[], Any], repeats: int = 5) -> float:
    """Return the mean over the ranks of the median seconds of work that all of them do at the same time."""
    return statistics.mean(comm.gather(median_seconds(comm, work, repeats)))


def _memory_bytes(comm: Comm) -> float:
    if comm.device.type == "cuda":
        return float(torch.cuda.get_device_properties(comm.device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / comm.info.local_world
