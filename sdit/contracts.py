"""The types that several packages share.

Shapes: B samples of a rank, G samples of an expert-parallel group, D width, M experts of a block, T timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, SupportsIndex

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Progress = Callable[[int, int], None]  # called with what is done and the total
Precision = Literal["fp32", "tf32", "bf16"]  # of the products of a model that samples


@dataclass(frozen=True)
class RawBatch:
    """Loaded samples, before timesteps and noise are added.

    `index` (B,) int64 is the position of the sample in the run (images seen before it). All random numbers depend on it.
    `x0` (B, C, H, W) float32 is in [-1, 1] for pixels and scaled for latents. `y` (B,) int64 are labels.
    """

    index: np.ndarray
    x0: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a rank.

    `x0` and `noise` are (B, C, H, W). `t` (B,) is int64, or float in [0, 1] for flow. `y` (B,) int64 are labels after label
    drop. `index` (B,) int64 are sample indices in the run. `other_target` (B, C, H, W) is noise - x0 of the sample before each
    in the global batch, None without the contrastive loss.
    """

    index: Tensor
    x0: Tensor
    noise: Tensor
    t: Tensor
    y: Tensor
    other_target: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """The decisions of the gates of all blocks for a batch.

    `task` (B,) int64 is the gate task of each sample, 0..T-1. `gate_probs` (depth, B, M) float32 is the softmax, with
    gradient. `experts` (depth, B, k) int64 are the chosen experts by descending probability. Models without gates have empty
    tensors (depth 0).
    """

    task: Tensor
    gate_probs: Tensor
    experts: Tensor


@dataclass(frozen=True)
class ModelOutput:
    """The `prediction` (B, C_out, H, W) and the `routing` that it was computed with. It is the same type in train and eval.

    `aux_loss` is the scalar that token-routed experts add to the loss in training, weighted and summed over their blocks (None:
    no such experts). Its mean over ranks is that of the micro-step. It is 0 where no gradient is asked for. `tokens` are the
    `TokenStatistics` of these blocks.
    """

    prediction: Tensor
    routing: Routing
    aux_loss: Tensor | None = None
    tokens: Any = None


@dataclass(frozen=True)
class LossParts:
    """Per-sample loss terms of shape (B,): weighted `mse`, `vlb`, the flow terms before their weights, and the sum `loss`.

    `vlb` is zero if the variance is not learned. `direction` and `contrastive` are None if their weights are 0.
    """

    mse: Tensor
    vlb: Tensor
    loss: Tensor
    output: Any = None
    direction: Tensor | None = None
    contrastive: Tensor | None = None


@dataclass(frozen=True)
class TaskView:
    """The samples whose gates a forward pass computes.

    `task` (G,) int64 are gate tasks of the rank's B samples, or of its whole expert-parallel group. `own` selects the rank's
    B rows. `experts` (depth, G, k) int64 fixes the chosen experts (None: the model chooses its top-k). `kept`
    (depth, G, k) bool is False where an expert at capacity drops the sample (None: no limit).
    """

    task: Tensor
    own: slice | Tensor
    experts: Tensor | None = None
    kept: Tensor | None = None


class ForwardPass(Protocol):
    """Moves tokens to experts and back during one forward and backward pass. It has no parameters.

    A block calls `dispatch`, `compute` and `combine` in this order. Only the pass uses the values that `dispatch` and
    `compute` return. Transfers overlap with the computation between the calls. All gradients (z, gates, expert weights) are
    computed by autograd.
    """

    view: TaskView

    def dispatch(self, block: SupportsIndex, z: Tensor, gates: Tensor, experts: Any) -> Any:
        """Start to send tokens z (B, L, D) to their experts.

        `gates` (G, M) are zero where an expert is unused or dropped.
        """

    def compute(self, dispatched: Any) -> Any:
        """Compute the local experts on local and received tokens, and start to send results back."""

    def combine(self, computed: Any) -> Tensor:
        """Return the mixture m_i(z, t) (B, L, D) of the block's experts. Wait for the results of other ranks."""


class Dispatcher(Protocol):
    """Creates forward passes. It is the only object that differs between EP = 1 and EP = n."""

    def forward_pass(self, task: Tensor) -> ForwardPass:
        """Return the pass for samples with gate tasks (B,). The model calls it once per forward pass, before block 0."""


class TokenPass(Protocol):
    """Moves tokens to token-routed experts and back during one forward and backward pass. It has no parameters.

    A block calls `dispatch`, `compute` and `combine` in this order, and computes its shared experts after `dispatch`. Only the
    pass uses the values that `dispatch` and `compute` return. All gradients (x, weights of the routes, experts) are computed
    by autograd. If activation checkpointing computes a block again in backward, the block makes the same calls again, with the
    same choice of experts: `choices` holds the `TokenChoice` of each block since its first computation.
    """

    choices: dict[int, Any]

    def dispatch(self, block: SupportsIndex, x: Tensor, routes: Any, experts: Any) -> Any:
        """Start to send tokens x (N, D) to their experts. `routes` are the block's `TokenRoutes` of these N tokens.

        `experts` (an `Experts`, or a wrapper with its `local` experts) are those of the block that this process has.
        """

    def compute(self, dispatched: Any) -> Any:
        """Compute the local experts on local and received tokens, and start to send results back."""

    def combine(self, computed: Any) -> Tensor:
        """Return the sum (N, D) over experts of weight times output for each token, in the dtype of the experts.

        Wait for the results of other ranks. A token without an expert gets zeros.
        """

    def sum_over_ranks(self, counts: Tensor) -> Tensor:
        """Return int64 counts, summed over all ranks of the micro-step. Only training calls it, at the end of a forward pass."""


class TokenDispatcher(Protocol):
    """Creates token passes. It is the only object that differs between EP = 1 and EP = n."""

    def forward_pass(self) -> TokenPass:
        """Return a new pass. The model calls it once per forward pass, before block 0."""


@dataclass(frozen=True)
class SampleKey:
    """The position of a sample: shard number in the index and position in the shard.

    `epoch` is also an input of the random numbers of its augmentation.
    """

    epoch: int
    shard: int
    member: int
