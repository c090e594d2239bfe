"""What the fork server imports once for all ranks."""

import gc

import deepspeed  # noqa: F401
import scipy.optimize  # noqa: F401
import torch._dynamo  # noqa: F401

import sdit.evaluate.generate
import sdit.observe.sample_grids
import sdit.train.setup  # noqa: F401
from sdit.distributed.deepspeed_internals import import_muon_uncompiled

import_muon_uncompiled()
gc.freeze()  # a rank does not look through these objects again
