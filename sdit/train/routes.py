"""What a step needs to know of the gates: the prior's assignment, expert loads, and who computes which sample."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdit.config import Config, ExpertsConfig
from sdit.contracts import RawBatch
from sdit.model import Assignment, DiffusionTransformer, match_units
from sdit.model.moe.routes import Routes, exact_loads
from sdit.model.windows import expert_windows
from sdit.parallel.spread import ExpertSpread
from sdit.train.state import RunState

_log = logging.getLogger(__name__)
MODES = ("tokens", "weights", "seats")


def gate_routes(model: DiffusionTransformer, experts: ExpertsConfig) -> Routes:
    """Chosen experts and gates of all tasks at the model's present weights, on the host; one copy from the device."""
    top = model.all_gate_probs().topk(experts.top_k)
    host = torch.stack([top.indices.float(), top.values]).cpu().numpy()  # ids < 2^24 are exact in float32
    return Routes(host[0].astype(np.int64), host[1], experts.count)


def tasks_of(times: np.ndarray, timesteps: int) -> np.ndarray:
    """Gate task (N,) of times: themselves, or floor(t T) of continuous ones, as the model computes it."""
    if times.dtype.kind != "f":
        return times
    return np.minimum((times.astype(np.float32) * np.float32(timesteps)).astype(np.int64), timesteps - 1)


class StepRoutes:
    """Gates of all T tasks, once per step and only if something needs them, in one copy from the device."""

    def __init__(
        self, config: Config, model: DiffusionTransformer, state: RunState, spread: ExpertSpread | None
    ) -> None:
        self._config, self._model, self._state, self._spread = config, model, state, spread
        self._has_gates = config.model.variant == "switch"
        self._routes: Routes | None = None
        self._decided = state.layout_restored
        self.assignment: Assignment | None = None
        self.balance_loads: Tensor | None = None
        self.events: list[str] = []

    def forget(self) -> None:
        """The state was replaced: what was derived from it is gone."""
        self._routes, self.assignment = None, None

    def begin_step(self, first_index: int, step: int, times: np.ndarray) -> None:
        """Called before the first micro-step, with the times (global_batch,) of all ranks' samples."""
        self._routes = None
        if not self._has_gates:
            return
        if self._config.prior.weight > 0:
            self._match_prior(step)
        if self._config.balance.weight > 0:
            loads = exact_loads(self.routes.experts, self.routes.count)
            self.balance_loads = torch.from_numpy(loads).float().to(self._model.pos_embed.device)
        if self._spread is not None:
            self._arrange_experts(self._state.clock.images_seen)
            self._spread.begin_step(self.routes, first_index, tasks_of(times, self._config.model.timesteps))

    def begin_micro_step(self, micro_step: int, samples: RawBatch) -> RawBatch:
        """The samples this rank computes in the micro-step."""
        return samples if self._spread is None else self._spread.begin_micro_step(micro_step, samples)

    def traffic(self) -> tuple[float, ...]:
        """Bytes this rank sent since the last call, by mode, and seconds it waited for transfers."""
        if self._spread is None:
            return (0.0,) * (len(MODES) + 1)
        sizes, seconds = self._spread.traffic.take()
        return (*(float(sizes.get(mode, 0)) for mode in MODES), seconds)

    def report(self) -> dict[str, Any]:
        """The routing keys of metrics.jsonl, for a logged step."""
        report: dict[str, Any] = {
            "dropped_fraction": 0.0,
            "expert_load_max_over_mean": 1.0,
            "rank_work_max_over_mean": 1.0,
        }
        if self._has_gates:
            loads = exact_loads(self.routes.experts, self.routes.count)
            report["expert_load"] = loads.round(4).tolist()  # [block][expert], share of the tasks that use it
            report["expert_load_max_over_mean"] = float((loads.max(1) / loads.mean(1)).max())
        if self._spread is not None:
            statistics = self._spread.statistics()
            report["dropped_fraction"] = statistics.dropped_fraction
            report["dropped_by_block"] = statistics.dropped_by_block
            report["dropped_by_block_since_logged"] = statistics.dropped_since
            report["rank_work_max_over_mean"] = statistics.rank_work_max_over_mean
        return report

    @property
    def routes(self) -> Routes:
        """Chosen experts and gates of all tasks at the present weights, on the host."""
        if self._routes is None:
            self._routes = gate_routes(self._model, self._config.model.experts)
        return self._routes

    def _match_prior(self, step: int) -> None:
        """Solve the assignment every `prior.every_steps` steps; between them, and after a resume, the last one holds."""
        due = step % self._config.prior.every_steps == 0
        stored = self._state.prior_columns
        if due or stored is None:
            self.assignment = match_units(self.routes.experts, self._config.model)
            self._state.prior_columns = self.assignment.columns.tolist()
        elif self.assignment is None:
            self.assignment = Assignment(np.asarray(stored, dtype=np.int64), expert_windows(self._config.model))

    def _arrange_experts(self, images_seen: int) -> None:
        """Reconsider which expert sits where, and what travels, at the start and at the configured intervals."""
        spread, parallel = self._spread, self._config.parallel
        if spread is None or spread.ranks == 1:
            return
        batch = self._config.train.global_batch

        def due(every_images: int) -> bool:
            return images_seen // every_images > (images_seen - batch) // every_images

        move = not self._decided or due(parallel.placement_refresh_images)
        if not move and not due(parallel.exchange_refresh_images):
            return
        better = spread.reconsider(self.routes, move, first=not self._decided)
        self._decided = True
        if better is not None:
            layout, reason = better
            moved = self._state.rearrange(layout)
            self.events.append(f"{reason}; {moved} experts moved")
