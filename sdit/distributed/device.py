"""The device of a rank, and the settings that torch and DeepSpeed need before they use it."""

from __future__ import annotations

import os
import socket
from typing import Literal

import torch

from sdit.config import TrainConfig
from sdit.errors import ConfigError
from sdit.launch_environment import RankInfo
from sdit.model.precision import allow_tf32

Device = Literal["auto", "cpu", "cuda"]
ACCELERATOR = "DS_ACCELERATOR"
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
INDUCTOR = "TORCHINDUCTOR_DETERMINISTIC"  # torch.compile reads it at its first use; older releases do not know it
REPRODUCIBLE_WORKSPACES = (":4096:8", ":16:8")  # https://docs.nvidia.com/cuda/cublas/#results-reproducibility


def prepare_device(wanted: Device, train: TrainConfig) -> None:
    """Make the settings of a training rank. It is called before DeepSpeed is imported and before CUDA starts.

    Raises: ConfigError: if a variable of the environment contradicts a setting.
    """
    if wanted == "cpu":
        os.environ.setdefault(ACCELERATOR, "cpu")  # DeepSpeed chooses while it is imported, and would take the GPUs
    allow_tf32(train.matmul == "tf32")
    if train.deterministic:
        _use_deterministic_algorithms()


def choose_device(info: RankInfo, wanted: Device) -> torch.device:
    """Return the device of a rank, and make it torch's current one. Each rank of a node has another GPU.

    Raises: ConfigError: if the node has no GPU for this rank.
    """
    # Otherwise a product may sum parts of its inner dimension in bf16: the gradient of a gate sums D^2 numbers.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        build = "which can use none" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        raise ConfigError(
            f"parallel.device: cuda, but torch {torch.__version__} ({build}) sees no GPU on host {socket.gethostname()}; "
            "legal: auto, cpu, or a node with a GPU and its driver"
        )
    device = torch.device("cuda", _gpu_index(info))
    torch.cuda.set_device(device)
    return device


def check_accelerator(device: torch.device) -> None:
    """Check that DeepSpeed uses the kind of device that sdit uses.

    Raises: ConfigError: if it does not.
    """
    from deepspeed.accelerator import get_accelerator

    chosen = get_accelerator().device_name()
    if chosen != device.type:
        raise ConfigError(
            f"{ACCELERATOR}: DeepSpeed uses {chosen!r}, but this rank uses {device.type!r}; "
            f"legal: parallel.device and {ACCELERATOR} that agree, or no such variable"
        )


def _gpu_index(info: RankInfo) -> int:
    """Return the index of a rank's GPU among the visible ones: its local rank, or 0 if the launcher shows each rank one GPU.

    Raises: ConfigError: if there are fewer GPUs than ranks.
    """
    count = torch.cuda.device_count()
    if info.local_rank < count:
        return info.local_rank
    if count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        return 0  # NCCL refuses two ranks on one GPU
    raise ConfigError(
        f"local rank {info.local_rank}: this node has {count} GPUs; "
        "legal: one rank per GPU, or a CUDA_VISIBLE_DEVICES of its own for each rank"
    )


def _use_deterministic_algorithms() -> None:
    """Choose algorithms that give the same bits for the same input, on CUDA too. torch raises where there is none.

    Raises: ConfigError: if the environment asks cuBLAS for a workspace with which its results vary.
    """
    given = os.environ.setdefault(WORKSPACE, REPRODUCIBLE_WORKSPACES[0])
    if given not in REPRODUCIBLE_WORKSPACES:
        raise ConfigError(
            f"{WORKSPACE}: {given!r} is not legal with train.deterministic: true; "
            f"legal: {', '.join(REPRODUCIBLE_WORKSPACES)}, or no such variable"
        )
    os.environ[INDUCTOR] = "1"  # no choice by measured times
    torch.backends.cudnn.benchmark = False  # it chooses by measured times
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
