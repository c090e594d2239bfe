"""RoutingTable that several tests share; training the gates takes seconds, so it is done once."""

from __future__ import annotations

import pytest
from learned_gates import shared_learned_routes

from sdit.expert_parallel.routing_table import RoutingTable


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> RoutingTable:
    """Depth 12, M 16, k 2, the width of S/2: gates after 600 steps on the prior."""
    return shared_learned_routes(tmp_path_factory)
