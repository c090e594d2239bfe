"""Versions, and the ceilings that the other figures are compared with: matrix products and copies."""

from __future__ import annotations

import platform

import deepspeed
import torch
from rows import NAMES, Machine, Row

from sdit.model.moe.kernels import has_triton


def measure(machine: Machine) -> list[Row]:
    """Versions, and TFLOP/s and GB/s."""
    side, megabytes = (256, 1) if machine.is_tiny else (8192, 1024)
    rows = [
        Row("device", torch.cuda.get_device_name() if machine.is_cuda else platform.processor() or "CPU"),
        Row("Python, torch, DeepSpeed", f"{platform.python_version()}, {torch.__version__}, {deepspeed.__version__}"),
        Row("Triton with a compiler", "yes" if has_triton() else "no"),
    ]
    if machine.is_cuda:
        rows.append(Row("NCCL", ".".join(map(str, torch.cuda.nccl.version()))))  # type: ignore[no-untyped-call]
    for dtype in (torch.bfloat16, torch.float32):
        left = torch.randn(side, side, dtype=dtype, device=machine.device)
        spent = machine.milliseconds(lambda left=left: left @ left, 20)  # type: ignore[misc]
        rows.append(Row(f"matrix product, {side}, {NAMES[dtype]}", 2 * side**3 / spent / 1e9, "TFLOP/s"))
    buffer = torch.empty(megabytes * 2**20, dtype=torch.uint8, device=machine.device)
    spent = machine.milliseconds(buffer.clone, 20)
    rows.append(Row("copy on the device, read and write", 2 * buffer.numel() / spent / 1e6, "GB/s"))
    return rows
