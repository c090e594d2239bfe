"""Two ranks on one device with gloo, because NCCL refuses that: their losses against those of one rank, by layout."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rows import Machine, Row, limited

ROOT = Path(__file__).resolve().parents[2]
TINY_RUN = ROOT / "tests" / "distributed" / "tiny.yaml"
LIMIT = 1e-4  # of the difference of two losses over the loss; the layout law on CPUs has the same
RANK_SECONDS = 300
NOT_SHARDED: tuple[str, ...] = ("parallel.expert=1",)
LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "data parallel": NOT_SHARDED,
    "EP 2, tokens": ("parallel.expert=2", "parallel.exchange=tokens"),
    "EP 2, weights": ("parallel.expert=2", "parallel.exchange=weights"),
    "EP 2, auto, experts placed again": ("parallel.expert=2", "parallel.placement_refresh_images=64"),
    "EP 2, checkpointing": ("parallel.expert=2", "parallel.activation_checkpointing=block"),
}
MLP = "model.experts.kind=mlp"
TOKEN_LAYOUTS = ("data parallel", "EP 2, tokens", "EP 2, checkpointing")  # the other keys have no effect on them
TOKEN_ROUTED = ("model.variant=dit", "model.moe={experts: 4, shared: 1, balance: aux}")


def measure(machine: Machine) -> list[Row]:
    """The largest relative difference of the losses of a run, for each layout."""
    layouts = {"EP 2, tokens": LAYOUTS["EP 2, tokens"]} if machine.is_tiny else dict(LAYOUTS)
    steps = f"train.steps={3 if machine.is_tiny else 20}"
    kinds: dict[str, tuple[str, ...]] = (
        {"": (steps,)}
        if machine.is_tiny
        else {"": (steps,), ", MLP": (steps, MLP), ", token-routed": (steps, *TOKEN_ROUTED)}
    )
    with tempfile.TemporaryDirectory() as folder:
        exact = train(machine, 1, {kind: (*NOT_SHARDED, *keys) for kind, keys in kinds.items()}, Path(folder, "one"))
        split = {
            name + kind: (*ways, *keys)
            for name, ways in layouts.items()
            for kind, keys in kinds.items()
            if kind != ", token-routed" or name in TOKEN_LAYOUTS
        }
        found = train(machine, 2, split, Path(folder, "two"))
    rows = []
    for name, losses in found.items():
        kind = next(kind for kind in reversed(kinds) if name.endswith(kind))
        pairs = zip(losses, exact[kind], strict=True)
        rows.append(limited(f"2 ranks, {name}: loss against 1 rank", max(abs(a - b) / b for a, b in pairs), "", LIMIT))
    return rows


def train(machine: Machine, world: int, runs: Mapping[str, tuple[str, ...]], folder: Path) -> dict[str, list[float]]:
    """Train the runs in one process group. Return the losses of each step of each run."""
    folder.mkdir()
    folders = [folder / str(number) for number in range(len(runs))]
    cases = [
        {"overrides": [*keys, f"parallel.device={machine.device.type}"], "run_dir": str(run_dir)}
        for run_dir, keys in zip(folders, runs.values(), strict=True)
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder / "cases.json"), machine.device.type]
    ranks = [subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank)}) for rank in range(world)]
    try:
        codes = [rank.wait(RANK_SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(codes):
        raise RuntimeError(f"ranks of {world} ended with {codes}")
    return {
        name: [record["loss"] for record in map(json.loads, _lines(run_dir))]
        for name, run_dir in zip(runs, folders, strict=True)
    }


def _lines(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def run_rank(cases: list[dict[str, Any]], device: str) -> None:
    """Train all cases as one rank. Both ranks use the first device."""
    from sdit.config import load_config, resolve_run
    from sdit.distributed.comm import Comm
    from sdit.launch_environment import RankInfo
    from sdit.observe.metrics_file import MetricsFile
    from sdit.train.events import Observers
    from sdit.train.setup import open_trainer

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    info = RankInfo(rank, world, local_rank=0, local_world=1, source="the check")
    with Comm(info, RANK_SECONDS, device, backend="gloo") as comm:  # type: ignore[arg-type]
        for case in cases:
            config = load_config(TINY_RUN, [*case["overrides"], f"run_dir={case['run_dir']}"])
            observers = Observers([MetricsFile(Path(config.run_dir))], comm.is_first)
            run = resolve_run(config, {"zero_optimization": {"stage": 1}}, "the check", world, world)
            with open_trainer(run, comm, observers) as trainer:
                trainer.run()
            observers.close()


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    if sys.argv[2] == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    run_rank(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
