"""The benchmark of expert layers gives DeepSpeed's layer the same problem."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.harness import ROOT

TOKENS = 5


@pytest.mark.parametrize("is_even", [False, True])
def test_deepspeed_routes_the_tokens_of_a_sample_as_we_do(is_even: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import moe_peers as peers

    case = peers.Case("S/2", experts=4, kind="mlp", batch=8, ranks=2, is_even=is_even)
    ranks: list[Any] = [SimpleNamespace(rank=rank) for rank in range(case.ranks)]
    gates = [peers.DeepSpeedTaskGate(case, comm) for comm in ranks]
    ours = peers.TaskGate(case)
    for _ in range(3):
        tasks = ours.draw()
        for rank, gate in enumerate(gates):
            # What DeepSpeed's layer asks for: loss, capacity, number of experts, experts, places, gates, counts.
            *_, chosen, _, _, counts = gate(torch.randn(case.batch * TOKENS, case.width), None, True)
            wanted = ours.routes.experts[0, tasks[rank :: case.ranks]]
            assert np.array_equal(chosen.T.sort(1).values, np.sort(np.repeat(wanted, TOKENS, axis=0), axis=1))
            assert counts.tolist() == (TOKENS * np.bincount(wanted.ravel(), minlength=case.experts)).tolist()
