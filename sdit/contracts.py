"""The types that cross packages, and nothing else. Shapes use B samples, D width, M experts, T timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class RawBatch:
    """Loaded samples before the objective's draws.

    `index` (B,) int64: position of the sample in the run (images seen before it), the key of all randomness;
    `x0` (B, C, H, W) float32 in [-1, 1] for pixels, scaled for latents; `y` (B,) int64 labels.
    """

    index: np.ndarray
    x0: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a rank: `x0`, `noise` (B, C, H, W); `t` (B,) int64 (float in [0, 1] for flow);
    `y` (B,) int64 after label drop; `index` (B,) int64 sample indices in the run."""

    index: Tensor
    x0: Tensor
    noise: Tensor
    t: Tensor
    y: Tensor


@dataclass(frozen=True)
class Routing:
    """What the gates of all blocks decided for a batch.

    `task` (B,) int64 gate task of each sample, 0..T-1; `gate_probs` (depth, B, M) float32 softmax, with gradient;
    `experts` (depth, B, k) int64 chosen experts by falling probability.
    Empty tensors (depth 0) for models without a gate.
    """

    task: Tensor
    gate_probs: Tensor
    experts: Tensor


@dataclass(frozen=True)
class ModelOutput:
    """`prediction` (B, C_out, H, W) and the `routing` it was computed with; the same type in train and eval."""

    prediction: Tensor
    routing: Routing


@dataclass(frozen=True)
class LossParts:
    """Per-sample losses of shape (B,): weighted `mse`, `vlb` (zero without learned variance), and their sum `loss`."""

    mse: Tensor
    vlb: Tensor
    loss: Tensor
    output: Any = None

    def __getitem__(self, key: str) -> Tensor:
        return getattr(self, key)


@dataclass(frozen=True)
class TaskView:
    """Which samples a forward pass needs gates for.

    `task` (G,) int64 gate tasks: the rank's own B samples, or those of its whole expert-parallel group;
    `own` picks the rank's B rows out of G; `experts` (depth, G, k) int64 fixes the choice (None: the model takes its own
    top-k); `kept` (depth, G, k) bool is False where an expert was full and drops the sample (None: dropless).
    """

    task: Tensor
    own: slice | Tensor
    experts: Tensor | None = None
    kept: Tensor | None = None


class ForwardPass(Protocol):
    """Brings tokens and experts together during one forward and backward pass of the model. It has no parameters.

    A block calls `dispatch`, `compute` and `combine` in this order. What `dispatch` and `compute` return is private to the
    pass. Work that the block does between the calls hides transfers. All gradients (z, gates, expert weights) flow by autograd.
    """

    view: TaskView

    def dispatch(self, block: int, z: Tensor, gates: Tensor, experts: Any) -> Any:
        """Start to send tokens z (B, L, D) to their experts. `gates` (G, M) are zero where an expert is unused or dropped."""
        ...

    def compute(self, dispatched: Any) -> Any:
        """Compute the experts of this rank on its own tokens and on those that arrived, and start to send results back."""
        ...

    def combine(self, computed: Any) -> Tensor:
        """Return the mixture m_i(z, t) (B, L, D) of the block's experts. Wait for the results of other ranks."""
        ...


class Dispatcher(Protocol):
    """Makes forward passes. It is the one object that differs between EP = 1 and EP = n."""

    def forward_pass(self, task: Tensor) -> ForwardPass:
        """Return the pass for samples with gate tasks (B,). The model calls it once per forward pass, before block 0."""
        ...


@dataclass(frozen=True)
class SampleKey:
    """Where a sample is stored: shard number in the index and position inside the shard; `epoch` keys its augmentation."""

    epoch: int
    shard: int
    member: int


SampleKeys = Sequence[SampleKey]
