"""The process group, DeepSpeed's engine, and the shards of its state."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # otherwise DeepSpeed warns on each rank that it found no accelerator
