"""The losses of the flow path that are added to the squared error: direction of the velocity, and contrastive flow matching."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdit.contracts import Batch
from sdit.diffusion import build_objective
from sdit.errors import ConfigError
from sdit.topology import plan_batch
from sdit.train.batches import rank_requests, with_other_targets
from tests.cases.commands import ROOT

NUMBERS = np.load(ROOT / "tests" / "data" / "recipe_flow_losses.npz")
WEIGHTS: list[dict[str, float]] = json.loads(str(NUMBERS["weights"]))
LABELS = torch.zeros(len(NUMBERS["t"]), dtype=torch.int64)


def tensor(name: str) -> Tensor:
    return torch.from_numpy(NUMBERS[name])


@pytest.mark.parametrize("case", range(len(WEIGHTS)))
def test_losses_and_gradients_are_those_of_the_specification(case: int) -> None:
    weights, output = WEIGHTS[case], tensor("model_output").requires_grad_()
    seen = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(x)
        return output

    parts = build_objective({"path": "flow", **weights})(model, tensor("x0"), tensor("t"), LABELS, tensor("noise"))
    torch.testing.assert_close(seen[0], tensor("x_t"), rtol=1e-5, atol=1e-6)
    for name in ("mse", "direction", "contrastive"):
        if name == "mse" or weights[f"{name}_weight"]:
            np.testing.assert_allclose(getattr(parts, name).detach(), NUMBERS[name], rtol=1e-5)
        else:
            assert getattr(parts, name) is None
    np.testing.assert_allclose(parts.loss.detach(), NUMBERS[f"loss.{case}"], rtol=1e-5)
    parts.loss.mean().backward()
    expected = tensor(f"grad.{case}")
    assert output.grad is not None
    assert torch.linalg.vector_norm(output.grad - expected) <= 1e-4 * torch.linalg.vector_norm(expected)


class Ring:
    """The ranks of a process group that call `from_rank_before` in turn, in two rounds: all send, then all receive."""

    def __init__(self, rank: int, world: int, sent: dict[int, Tensor]) -> None:
        self.rank, self.world, self._sent = rank, world, sent

    def from_rank_before(self, rows: Tensor) -> Tensor:
        self._sent[self.rank] = rows
        return self._sent.get((self.rank - 1) % self.world, rows)


@pytest.mark.parametrize(("world", "micro_batch"), [(1, None), (1, 3), (2, 6), (2, 2), (3, 2), (4, 1), (12, 1)])
@pytest.mark.parametrize("first", [0, 12, 101])
def test_the_other_sample_is_the_one_before_in_the_global_batch(
    world: int, micro_batch: int | None, first: int
) -> None:
    size, sent = 12, {}
    plan = plan_batch(size, micro_batch, world)

    def batches(rank: int) -> list[Batch]:
        found = []
        for request in rank_requests(plan, [first], rank, world):
            index = torch.from_numpy(request.indices)
            x0 = index.double()[:, None, None, None].expand(-1, 1, 1, 1)
            found.append(Batch(index, x0, 1000 * x0, index, index))
        return found

    for _ in range(2):
        shares = [with_other_targets(batches(rank), first, Ring(rank, world, sent)) for rank in range(world)]
    for batch in (batch for share in shares for batch in share):
        before = first + (batch.index - first - 1) % size
        assert batch.other_target is not None and torch.equal(batch.other_target.flatten(), 999.0 * before)


def test_terms_that_are_off_cost_nothing() -> None:
    parts = build_objective({"path": "flow"})(lambda x, t, y: x, tensor("x0"), tensor("t"), LABELS, tensor("noise"))
    assert parts.loss is parts.mse and parts.direction is None and parts.contrastive is None


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"direction_weight": 1.0}, "diffusion.direction_weight: 1 needs a velocity; legal with path diffusion: 0"),
        ({"contrastive_weight": 0.05}, "diffusion.contrastive_weight: 0.05 needs a velocity"),
        ({"path": "flow", "direction_weight": -1.0}, "diffusion.direction_weight: -1.0 is not legal"),
        ({"path": "flow", "contrastive_weight": 1.0}, "diffusion.contrastive_weight: 1.0 is not legal"),
        ({"timestep_sampling": "normal"}, "diffusion.timestep_sampling: 'normal' is not legal"),
        ({"logit_std": 0.0}, "diffusion.logit_std: 0.0 is not legal"),
        ({"time_shift": 0.0}, "diffusion.time_shift: 0.0 is not legal"),
        ({"logit_mean": "a"}, "diffusion.logit_mean: 'a' is not legal"),
        ({"weighting": "uw", "time_shift": 3.0}, "diffusion.time_shift: 3 with weighting uw; legal with uw: 1"),
        (
            {"weighting": "uw", "timestep_sampling": "logit_normal"},
            "diffusion.timestep_sampling: logit_normal with weighting uw; legal with uw: uniform, stratified",
        ),
    ],
)
def test_keys_that_make_no_sense_are_refused(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        build_objective(keys)
