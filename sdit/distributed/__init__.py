"""The only users of torch.distributed and deepspeed: ranks, expert exchange, engine."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns on every rank that it found none
