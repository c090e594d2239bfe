"""Training: the loop, its clock, its state on disk."""
