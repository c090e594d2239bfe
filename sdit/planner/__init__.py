"""Estimates the resources of a run before it starts, from the config and the model's shapes. Tests compare with measurements."""
