"""RoutingTable that several tests share; training the gates takes seconds, so it is done once."""

from __future__ import annotations

import pytest
from learned_gates import learned_routes

from sdit.expert_parallel.routing_table import RoutingTable


@pytest.fixture(scope="session")
def learned() -> RoutingTable:
    """Depth 12, M 16, k 2, the width of S/2: gates after 600 steps on the prior."""
    return learned_routes(12, 16, 2, steps=600, width=384)
