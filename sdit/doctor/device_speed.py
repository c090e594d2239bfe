"""Measures the device of each rank, while all ranks measure: matrix products, a transformer's passes, memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from sdit.config import ModelConfig
from sdit.distributed.comm import Comm
from sdit.distributed.fabric import slowest_seconds
from sdit.model import DiffusionTransformer, build_model
from sdit.model.flops import flops_per_image
from sdit.planner.hardware import Device
from sdit.planner.layout import DeviceKind
from sdit.planner.time_formulas import compute_seconds

GIGA, TERA, GIB = 1e9, 1e12, 2**30
REPEATS = 5


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
    """Return the figures of the slowest rank's device while all ranks measure.

    The utilization is measured with fp32 on a CPU and with bf16 on a GPU.
    """
    kind = _kind(comm)
    sizes = SIZES[kind]
    fp32, bf16 = (
        2 * rows**3 / _slowest(comm, _product(comm, rows, dtype))
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
        memory_gigabytes_per_second=2 * sizes.copy_bytes / _slowest(comm, lambda: other.copy_(source)) / GIGA,
        host_copy_gigabytes_per_second=sizes.copy_bytes / _slowest(comm, lambda: on_host.copy_(source)) / GIGA,
    )


def block_work(comm: Comm) -> Callable[[], Any]:
    """Return the forward pass of one block, as the ranks compute between two exchanges of experts."""
    kind = _kind(comm)
    sizes = SIZES[kind]._replace(depth=1)
    model, inputs = _dit(comm, sizes, sizes.widths[1], torch.bfloat16 if kind == "cuda" else torch.float32)

    @torch.no_grad()
    def forward() -> None:
        model(*inputs)

    return forward


def _kind(comm: Comm) -> DeviceKind:
    return "cuda" if comm.device.type == "cuda" else "cpu"


def _slowest(comm: Comm, work: Callable[[], Any]) -> float:
    return slowest_seconds(comm, work, REPEATS)


def _product(comm: Comm, rows: int, dtype: torch.dtype) -> Callable[[], Any]:
    left, right = (torch.full((rows, rows), 0.5, dtype=dtype, device=comm.device) for _ in range(2))
    return lambda: left @ right


def _utilization(comm: Comm, sizes: Sizes, width: int, dtype: torch.dtype, peak: float) -> float:
    """Return model FLOPs of forward and backward passes over the peak, at most 1."""
    model, inputs = _dit(comm, sizes, width, dtype)

    def passes() -> None:
        model(*inputs).prediction.square().mean().backward()

    flops = sizes.batch * flops_per_image(model.config).train
    return min(1.0, compute_seconds(flops, peak, 1.0) / _slowest(comm, passes))


def _dit(
    comm: Comm, sizes: Sizes, width: int, dtype: torch.dtype
) -> tuple[DiffusionTransformer, tuple[torch.Tensor, ...]]:
    """Return a DiT of a width on the device, and images, times and labels for it."""
    config = ModelConfig(
        variant="dit", depth=sizes.depth, width=width, heads=width // 64, patch_size=2, input_size=sizes.input_size
    )
    model = build_model(config)
    x = torch.randn(sizes.batch, config.channels, config.input_size, config.input_size).to(comm.device, dtype)
    times, labels = (torch.arange(sizes.batch, device=comm.device) for _ in range(2))
    return model.to(comm.device, dtype).train(), (x, times, labels)


def _memory_bytes(comm: Comm) -> float:
    if comm.device.type == "cuda":
        return float(torch.cuda.get_device_properties(comm.device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / comm.info.local_world
