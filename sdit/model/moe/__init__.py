"""Sparse experts whose routes depend on the timestep only: gates, experts, and where both meet in one process."""
