"""The process group, DeepSpeed's engine, and the shards of its state."""

import os

import torch

if not torch.cuda.is_available():
    # Otherwise DeepSpeed warns on each rank that it found no accelerator.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
