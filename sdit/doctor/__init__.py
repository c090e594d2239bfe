"""The doctor: it checks a launch before training. No module here imports torch before it is needed."""
