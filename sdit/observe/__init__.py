"""What people see of a run: metrics, progress, pictures."""
