"""Sparse experts that are selected by the timestep only: gates, experts, and their computation in one process."""
