"""The bytes that a rank sends in a block, from its plan. Traffic that is counted or measured is compared with them."""

from __future__ import annotations

import numpy as np

from sdit.expert_parallel.step_plan import BlockPlan
from sdit.expert_parallel.traffic_model import UnitCosts


def sent_bytes(plan: BlockPlan, costs: UnitCosts, replicated: np.ndarray, owned: np.ndarray) -> int:
    """`replicated` and `owned` (M,) bool mark the replicated experts and the experts of the rank."""
    rows = (costs.forwards + 1) * (len(plan.send_rows) + len(plan.remote.samples)) * costs.row_bytes
    replicas_owned, replicas_received = int((replicated & owned).sum()), int((replicated & ~owned).sum())
    weights = costs.forwards * (costs.ranks - 1) * replicas_owned + replicas_received
    return rows + weights * costs.expert_bytes
