"""Output of a run for people: metrics, progress, logs and images."""
