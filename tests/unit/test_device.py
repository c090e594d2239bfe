"""The device of a rank and its settings, with a torch that is told that there are GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sdit.config import TrainConfig
from sdit.distributed import comm as comm_module
from sdit.distributed import reshard as reshard_module
from sdit.distributed.deepspeed_internals import OffloadedZeroPartitions
from sdit.distributed.device import INDUCTOR, WORKSPACE, check_accelerator, choose_device, prepare_device
from sdit.distributed.engine import Engine
from sdit.distributed.reshard import Range, reshard
from sdit.errors import ConfigError
from sdit.launch_environment import RankInfo
from tests.distributed.harness import ROOT

TINY = ROOT / "tests" / "distributed" / "tiny.yaml"
CPU_RANK_ON_A_GPU_NODE = """
import os, sys
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 8
os.environ.pop("DS_ACCELERATOR", None)
from sdit.cli.train import main
code = main(sys.argv[1:])
from deepspeed.accelerator import get_accelerator
import torch._inductor.config
found = torch.are_deterministic_algorithms_enabled() and torch._inductor.config.deterministic
print(get_accelerator().device_name(), found)
sys.exit(code)
"""


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A node whose GPUs torch sees, as many as the list's first item says. It collects the devices made current."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.fixture
def unchanged_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore torch's settings and the environment after a test."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in (WORKSPACE, INDUCTOR):
        monkeypatch.delitem(os.environ, name, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)


@pytest.mark.parametrize(
    ("count", "visible", "local_rank", "index"), [(8, None, 3, 3), (1, "5", 3, 0), (1, None, 0, 0)]
)
def test_rank_has_the_gpu_that_its_launcher_meant(
    count: int, visible: str | None, local_rank: int, index: int, gpus: list[torch.device],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """All GPUs of the node are visible to each rank, or a launcher shows each rank its own."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert choose_device(RankInfo(local_rank, 8, local_rank, 8, "test"), "auto") == torch.device("cuda", index)
    assert gpus == [torch.device("cuda", index)]


@pytest.mark.parametrize(("count", "visible"), [(1, None), (2, "0,1")])
def test_more_ranks_than_gpus_are_refused(
    count: int, visible: str | None, gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError, match=rf"^local rank 2: this node has {count} GPUs; legal: one rank per GPU"):
        choose_device(RankInfo(2, 8, 2, 8, "test"), "auto")
    assert not gpus


@pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("cuda", 0)])
def test_deepspeed_is_told_the_index_of_the_gpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed reads LOCAL_RANK as an index, and refuses another local rank of Open MPI."""
    monkeypatch.setattr(os, "environ", {**os.environ, "OMPI_COMM_WORLD_LOCAL_RANK": "3"})
    comm_module._set_rendezvous(RankInfo(0, 1, 3, 4, "test"), device)
    index = str(3 if device.type == "cpu" else 0)
    assert (os.environ["LOCAL_RANK"], os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]) == (index, index)


def test_cpu_run_on_a_node_with_gpus_trains_on_the_cpu(tmp_path: Path) -> None:
    """DeepSpeed chooses its accelerator when it is imported. The settings of a rank come first."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    words = ["--config", str(TINY), "--run-dir", str(tmp_path / "run"), "train.steps=1", "parallel.device=cpu"]
    words += ["train.deterministic=true", "supervise.enabled=false"]
    result = subprocess.run(
        [sys.executable, "-c", CPU_RANK_ON_A_GPU_NODE, *words],
        env={**environment, "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == "cpu True"


def test_accelerator_that_disagrees_with_the_device_is_named() -> None:
    check_accelerator(torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"^DS_ACCELERATOR: DeepSpeed uses 'cpu', but this rank uses 'cuda'; legal: "):
        check_accelerator(torch.device("cuda", 0))


@pytest.mark.usefixtures("unchanged_settings")
def test_deterministic_run_sets_torch_and_cublas() -> None:
    try:
        prepare_device("auto", TrainConfig(deterministic=True))
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert os.environ[WORKSPACE] == ":4096:8" and os.environ[INDUCTOR] == "1"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("unchanged_settings")
def test_other_runs_change_nothing() -> None:
    prepare_device("auto", TrainConfig(deterministic=False))
    assert not torch.are_deterministic_algorithms_enabled()
    assert WORKSPACE not in os.environ and INDUCTOR not in os.environ


@pytest.mark.usefixtures("unchanged_settings")
def test_workspace_with_which_cublas_varies_is_refused() -> None:
    os.environ[WORKSPACE] = ":0:0"
    with pytest.raises(
        ConfigError, match=rf"^{WORKSPACE}: ':0:0' is not legal with train\.deterministic: true; legal: "
    ):
        prepare_device("auto", TrainConfig(deterministic=True))
    assert not torch.are_deterministic_algorithms_enabled()


def test_products_in_bf16_sum_in_float32() -> None:
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    choose_device(RankInfo(0, 1, 0, 1, "test"), "cpu")
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is False


class LateWrapper:
    """An optimizer wrapper whose gradients arrive in host memory when they are waited for, as copies to pinned memory do."""

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        self.single_partition_of_fp32_groups = [parameter]

    def _wait_for_offload_copies(self) -> None:
        for flat in self.single_partition_of_fp32_groups:
            assert flat.grad is not None
            flat.grad.copy_(torch.tensor([3.0, 4.0]))


def test_norm_is_that_of_offloaded_gradients_which_have_arrived() -> None:
    flat = torch.nn.Parameter(torch.zeros(2))
    flat.grad = torch.full((2,), 7.0)  # of the previous step
    backend = OffloadedZeroPartitions.__new__(OffloadedZeroPartitions)
    backend._wrapper = LateWrapper(flat)
    engine = Engine.__new__(Engine)
    engine._backend, engine.comm = backend, SimpleNamespace(device=torch.device("cpu"))  # type: ignore[assignment]
    assert engine.squared_gradient_norm().item() == 25.0


def test_offloaded_state_is_moved_on_the_device_of_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL exchanges tensors of the GPU only. The meta device takes its place."""
    exchanged: list[torch.Tensor] = []

    def exchange(received: torch.Tensor, sent: torch.Tensor, *_: Sequence[int]) -> None:
        exchanged.extend([received, sent])

    monkeypatch.setattr(reshard_module.dist, "all_to_all_single", exchange)
    monkeypatch.setattr(reshard_module, "_copy_out", lambda *_: None)  # a meta tensor has no values
    comm = SimpleNamespace(rank=0, world=1, device=torch.device("meta"))
    state = [Range("expert", 0, torch.arange(4.0))]

    def first_rank(_name: str, start: int, end: int) -> list[tuple[int, int, int]]:
        return [(0, start, end)]

    reshard(comm, state, state, first_rank, first_rank)  # type: ignore[arg-type]
    assert [(tensor.device.type, tensor.numel()) for tensor in exchanged] == [("meta", 4)] * 2
