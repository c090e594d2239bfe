"""Jobs of the exchange worker on whole models: images, re-placed state, and what a rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sdit.config import (
    Config,
    ExpertsConfig,
    ModelConfig,
    ParallelConfig,
    ResolvedRun,
    SampleConfig,
    load_config,
    resolve_run,
)
from sdit.distributed.comm import Comm
from sdit.expert_parallel.expert_parallel import ExpertParallel
from sdit.expert_parallel.placement import ExpertPlacement
from sdit.model import build_model, fill_buffers
from sdit.model.moe.base import Experts
from sdit.topology import BatchPlan
from sdit.train.sampling import sample_images
from sdit.train.setup import open_trainer

TINY = Path(__file__).with_name("tiny.yaml")


def error(actual: Tensor | None, expected: Tensor) -> float:
    """Largest difference over the largest true value; a missing gradient is infinitely wrong."""
    if actual is None:
        return float("inf")
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def model_config(width: int, kind: str, count: int, depth: int = 2) -> ModelConfig:
    experts = ExpertsConfig(count=count, top_k=2, kind=kind)  # type: ignore[arg-type]
    return ModelConfig(
        depth=depth, width=width, heads=2, patch_size=4, input_size=8, channels=1, classes=10, experts=experts
    )


def sampled_images(comm: Comm, folder: Path) -> list[dict[str, Any]]:
    """Largest difference between images drawn with sharded experts and with all experts in one place."""
    found = []
    for kind in ("linear", "mlp"):
        for ranks in (2, 4):
            parallel = ParallelConfig(expert=ranks)
            sample = SampleConfig(steps=4, guidance=2.0)
            config = Config(model=model_config(16, kind, 4), parallel=parallel, sample=sample)
            labels = np.arange(comm.rank, comm.rank + 3) % 10
            with torch.no_grad():
                whole, sharded = sharded_model(config, comm, ranks)
                drawn = [
                    sample_images(m, config.diffusion, config.sample, 3 * labels, labels) for m in (whole, sharded)
                ]
                for router in whole.routers:
                    for parameter in router.experts.parameters():
                        parameter.zero_()
                without = sample_images(whole, config.diffusion, config.sample, 3 * labels, labels)
            worst = {"error": error(drawn[1], drawn[0]), "without_experts": error(without, drawn[0])}
            gathered = comm.gather(worst)
            found.append({"kind": kind, "ranks": ranks} | {key: max(rank[key] for rank in gathered) for key in worst})
    return found


def sharded_model(config: Config, comm: Comm, ranks: int) -> tuple[Any, Any]:
    """A model with random weights, whole and with its experts placed at random."""
    whole = build_model(config.model, 0, comm.device)
    generator = torch.Generator().manual_seed(1)
    for parameter in whole.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    experts = ExpertParallel(ResolvedRun(config, {}, BatchPlan(8 * comm.world, 8, 1), ranks, comm.world, 0), comm)
    owners = np.random.default_rng(0).permuted(experts.placed.placement.expert_to_rank, axis=1)
    experts.restore({"ranks": ranks, "place": owners.tolist(), "at_hand": experts.placed.placement.replicated.tolist()})
    model = build_model(config.model, device="meta")

    def fill(built: Any) -> None:
        for name, parameter in built.named_parameters():
            owner, source = built.get_submodule(name.rpartition(".")[0]), whole.get_parameter(name)
            parameter.copy_(source[list(owner.ids)] if isinstance(owner, Experts) else source)
        fill_buffers(built)

    experts.shard(model, fill)
    return whole.eval(), model.eval()


def resolved(overrides: list[str], stage: int, comm: Comm) -> ResolvedRun:
    deepspeed = {"zero_optimization": {"stage": stage}}
    return resolve_run(load_config(TINY, overrides), deepspeed, "case", comm.world, comm.info.local_world)


def moved_experts(comm: Comm, folder: Path) -> list[dict[str, Any]]:
    """How many tensors of a trained state a random re-placement changes, by placement."""
    return changed_by_moves(comm, folder, ((2, 0), (2, 2), (4, 1)))


def more_moved_experts(comm: Comm, folder: Path) -> list[dict[str, Any]]:
    """The same for more layouts."""
    return changed_by_moves(comm, folder, ((2, 1), (4, 0), (4, 2)))


def changed_by_moves(comm: Comm, folder: Path, layouts: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    found = []
    for ranks, stage in layouts:
        more = [
            f"parallel.expert={ranks}",
            "train.steps=4",
            "model.experts.count=8",
            f"run_dir={folder}/moved-{ranks}-{stage}",
        ]
        with open_trainer(resolved(more, stage, comm), comm) as trainer:
            trainer.run()
            state = trainer.context.state
            before = whole_state(comm, state.snapshot().tensors)
            placement = state.experts.placed.placement
            owners = np.random.default_rng(stage).permuted(placement.expert_to_rank, axis=1)
            with torch.no_grad():
                moved = state.experts.placed.adopt(ExpertPlacement(owners, placement.replicated, ranks), state.kinds)
            after = whole_state(comm, state.snapshot().tensors)
            stale = sum(not torch.equal(masters, compute) for masters, compute in compute_weights(state))
            names = sorted({name.split("@")[0].split("#")[0].split("/")[0] for name in after})
            changed = [name for name in before if not np.array_equal(before[name], after[name])]
            found.append(
                {
                    "ranks": ranks,
                    "stage": stage,
                    "moved": moved,
                    "kinds": names,
                    "changed": changed,
                    "stale": comm.gather(stale),
                }
                | {
                    "same_names": before.keys() == after.keys(),
                    "zero": sum(not value.any() for value in after.values()),
                }
            )
    return found


def compute_weights(state: Any) -> list[tuple[Tensor, Tensor]]:
    """Every shard of the masters on this rank, with the same part of the weights that it computes with."""
    named = dict(state.engine.module.named_parameters())
    return [(p.master, named[p.name].detach().view(-1).narrow(0, p.start, p.numel)) for p in state.engine.local]


def whole_state(comm: Comm, tensors: Any) -> dict[str, np.ndarray]:
    """All ranks' parts put together: flat values by kind, name and expert id, in order of their offsets."""
    gathered: list[Any] = [None] * comm.world
    dist.all_gather_object(gathered, {name: value.copy() for name, value in tensors.items()})
    parts: dict[str, dict[int, np.ndarray]] = {}
    for name, value in (item for rank in gathered for item in rank.items()):
        stem, _, start = name.rpartition("@")
        parts.setdefault(stem, {})[int(start)] = value
    return {stem: np.concatenate([pieces[start] for start in sorted(pieces)]) for stem, pieces in parts.items()}


def held_sizes(comm: Comm, folder: Path) -> list[dict[str, Any]]:
    """float32 values on the fullest rank: of experts, of the rest, and of both; compute weights, two moments, EMA."""
    found = []
    for ranks, stage in [(size, stage) for size in (1, 2, 4) if comm.world % size == 0 for stage in (0, 1)]:
        run_dir = folder / f"sizes-{comm.world}-{ranks}-{stage}"
        more = ["model.experts.count=16", f"parallel.expert={ranks}", f"run_dir={run_dir}"]
        with open_trainer(resolved(more, stage, comm), comm) as trainer:
            engine, ema = trainer.context.engine, trainer.context.state.ema
            weights = [(name, p.numel()) for name, p in engine.module.named_parameters()]
            moments = [(p.name, p.moment(key).numel()) for p in engine.local for key in engine.moment_keys]
            averages = [(p.name, v.numel()) for p, v in zip(ema.shards, ema.values, strict=True)]
        for kind, values in {"weights": weights, "moments": moments, "ema": averages}.items():
            experts = sum(n for name, n in values if ".experts." in name)
            gathered = comm.gather([experts, sum(n for _, n in values) - experts])
            load_imbalance = dict(zip(("experts", "dense"), map(max, zip(*gathered, strict=True)), strict=True))
            row = {"world": comm.world, "ranks": ranks, "stage": stage, "kind": kind}
            found.append(row | load_imbalance | {"all": max(map(sum, gathered))})
    return found
