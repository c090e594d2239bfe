"""Sparse experts whose routes depend on the timestep alone: gates, experts, dispatch, plan, placement, seating."""
