"""A training step of one rank whose device is `meta`. DeepSpeed and the process group are replaced by stubs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdit.clock import Clock, StepSpan
from sdit.config import Config, ResolvedRun
from sdit.data.bad_samples import BadSampleCounter
from sdit.diffusion import build_objective
from sdit.distributed.engine import Engine
from sdit.expert_parallel.expert_parallel import ExpertParallel
from sdit.model import DiffusionTransformer, build_model
from sdit.topology import BatchPlan
from sdit.train.batches import MicroBatch
from sdit.train.module import TrainModule
from sdit.train.prior import PriorSchedule
from sdit.train.step import TrainStep
from sdit.train.timing import StepTimer
from sdit.transfers import UploadStream
from tests.gpu_like.conftest import META, Waits

MODEL = {
    "depth": 2, "width": 32, "heads": 2, "patch_size": 4, "input_size": 8, "channels": 1, "classes": 10, "timesteps": 64,
}  # fmt: skip
GLOBAL_BATCH = 8


def make_config(variant: str, kind: str = "linear", expert: int = 1, **sections: Any) -> Config:
    """A config that trains `variant` with four experts of `kind` per block, two of them used."""
    model = {**MODEL, "variant": variant, "experts": {"count": 4, "top_k": 2, "kind": kind}}
    model |= sections.pop("more_model", {})
    return Config.model_validate(
        {
            "seed": 3,
            "model": model,
            "data": {"source": "digits"},
            "optimizer": {"clip_grad_norm": 1.0},
            "train": {"steps": 20, "global_batch": GLOBAL_BATCH},
            "parallel": {"expert": expert},
            **sections,
        }
    )


class FakeComm:
    """The first of `world` ranks. Its collectives leave the values as they are."""

    device, rank, is_first = META, 0, True

    def __init__(self, world: int) -> None:
        self.world = world

    def sum(self, values: Tensor) -> Tensor:
        return values

    def from_rank_before(self, rows: Tensor) -> Tensor:
        return rows

    def from_first(self, value: int) -> int:
        return value


class FakeDeepSpeed:
    """The calls of a DeepSpeed engine that `Engine` makes, with a plain optimizer."""

    def __init__(self, module: torch.nn.Module, waits: Waits) -> None:
        self.module, self._waits = module, waits
        groups = [{"params": list(module.parameters()), "role": "model"}]
        self.basic_optimizer = torch.optim.AdamW(groups, foreach=True)

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        self._waits.events.append("backward")
        loss.backward()

    def is_gradient_accumulation_boundary(self) -> bool:
        return True

    def step(self) -> None:
        self.basic_optimizer.step()
        self.basic_optimizer.zero_grad()


class MetaEngine(Engine):
    """`Engine` around `FakeDeepSpeed`."""

    def __init__(self, module: torch.nn.Module, comm: Any, waits: Waits) -> None:
        self.comm, self.deepspeed = comm, FakeDeepSpeed(module, waits)
        parameters = list(module.parameters())
        self._backend: Any = SimpleNamespace(
            gradients=lambda: [p.grad for p in parameters if p.grad is not None], norm_shares=lambda: 1.0
        )


def meta_step(config: Config, world: int, waits: Waits) -> tuple[TrainStep, DiffusionTransformer]:
    """Return the training step and the model of rank 0 of `world` ranks."""
    comm: Any = FakeComm(world)
    plan = BatchPlan(GLOBAL_BATCH, GLOBAL_BATCH // world, 1)
    experts = ExpertParallel(ResolvedRun(config, {}, plan, world, world, 0), comm)
    model = build_model(config.model, device="meta")
    experts.shard(model, lambda _: None)
    objective = build_objective(config.diffusion, config.model.timesteps).to(META)
    model.final_layer.register_forward_hook(lambda *_: waits.events.append("forward"))
    engine = MetaEngine(TrainModule(model, objective, config.prior.weight, config.balance.weight), comm, waits)
    state = SimpleNamespace(
        clock=Clock(),
        prior=PriorSchedule.of(config),
        ema=SimpleNamespace(update=lambda _: None),
        kinds=None,  # of migrated experts: there are none
    )
    quiet = SimpleNamespace(progress=lambda: None)
    context: Any = SimpleNamespace(
        run=SimpleNamespace(config=config, batch=plan), comm=comm, engine=engine, model=model, objective=objective,
        experts=experts, state=state, heartbeat=quiet, signals=SimpleNamespace(requested=False), timer=StepTimer(META),
        times_of=lambda first: objective.draw_timesteps(config.seed, first, GLOBAL_BATCH),
        loader=SimpleNamespace(bad_samples=BadSampleCounter(0.0, 1)), event=lambda *_: None,
    )  # fmt: skip
    saver = SimpleNamespace(flags=lambda: (0.0, 0.0, 0.0), advance=lambda *_: None)
    checkpoints: Any = SimpleNamespace(saver=saver, can_roll_back=False)
    return TrainStep(context, checkpoints), model


def run_step(step: TrainStep) -> None:
    """Take the step at the present clock."""
    clock = step._context.state.clock
    length = 20 * GLOBAL_BATCH
    samples = step._context.run.batch.micro_batch
    index = np.arange(samples) * step._context.comm.world
    times = step._context.times_of(0)
    images, labels = np.zeros((samples, 1, 8, 8), np.float32), np.zeros(samples, np.int64)
    upload = UploadStream(META).begin((images, images, times[index], labels))
    step.run([MicroBatch(index, times, upload)], StepSpan(clock, clock.after(GLOBAL_BATCH), length))
