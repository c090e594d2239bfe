"""Prometheus metrics of a run: their names, the files in shared memory that hold them, and the exporter that serves them.

Ranks and supervisors write to shared metrics files. One supervisor per node serves all files of its node. No module here
imports torch.
"""
