"""Sparse experts, selected by the timestep or by each token: gates, experts, and their computation in one process."""
