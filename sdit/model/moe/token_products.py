"""Token-routed experts one after another, with a backward pass that keeps few numbers.

n tokens, D width, H hidden width, M_local experts, E (token, expert) pairs. Autograd would save 2 D + 2 H numbers of a pair (3 H
for gated experts) and the gradient of each matrix twice. This keeps H (2 H), computes the activation again, and writes the
gradient of a matrix into that of its stack. The gradient of H takes the memory of H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sdit.model.moe.base import ExpertRows, Experts
from sdit.model.moe.mlp_experts import MlpExperts, StackedExperts, SwiGluExperts

ROWS = 256  # of one expert, whose activations backward has in memory at a time


class Network(NamedTuple):
    """An expert: y = activation(x W_i + b_i, ...) W + b. Each (W, b) are numbers of stacks; b None: there is no bias.

    `backward` takes the gradient of the activation and the hidden numbers, and overwrites these with their gradients.
    """

    inputs: tuple[tuple[int, int | None], ...]
    activation: Callable[..., Tensor]
    backward: Callable[..., None]
    output: tuple[int, int | None]


def _gelu(hidden: Tensor) -> Tensor:
    return F.gelu(hidden, approximate="tanh")


def _gelu_backward(grad: Tensor, hidden: Tensor) -> None:
    torch.ops.aten.gelu_backward.grad_input(grad, hidden, approximate="tanh", grad_input=hidden)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> None:
    silu = F.silu(gate)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate)
    torch.mul(grad, silu, out=up)


NETWORKS: dict[type[Experts], Network] = {
    MlpExperts: Network(((0, 1),), _gelu, _gelu_backward, (2, 3)),
    SwiGluExperts: Network(((0, None), (1, None)), _gated, _gated_backward, (2, None)),
}


class StackGradients:
    """The gradients of the stacks of one block's experts, which compute `calls` buffers of tokens.

    Each call of backward adds to the same memory, and the last one returns it to autograd. A gradient per call would need
    the memory of all experts as many times.
    """

    def __init__(self, calls: int) -> None:
        self._left = calls
        self._sums: list[Tensor] = []

    def begin(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        """Return the memory that a call of backward adds to."""
        self._sums = self._sums or [torch.zeros_like(stack) for stack in stacks]
        return self._sums

    def end(self) -> Sequence[Tensor | None]:
        """Return the gradients after the last call, and None for each stack before."""
        self._left -= 1
        if self._left:
            return [None] * len(self._sums)
        sums, self._sums = self._sums, []
        return sums


def mix_tokens(
    experts: Experts, x: Tensor, weights: Tensor, rows: ExpertRows, gradients: StackGradients | None = None
) -> Tensor:
    """Return the weighted sums (n, D) of the experts in `rows` for tokens x (n, D), with weights (n, M_local).

    `gradients` is shared by all calls with these experts in a block (None: there is one). Backward must reach all of them.
    """
    assert isinstance(experts, StackedExperts)
    if experts.is_grouped():
        return experts.mix(x[:, None], weights, rows)[:, 0]
    stacks = [experts.get_parameter(name) for name in experts.stacks]
    gradients = StackGradients(1) if gradients is None else gradients
    work = _Work(NETWORKS[type(experts)], rows.by_expert(), gradients, torch.is_grad_enabled())
    return _Mix.apply(work, x.to(stacks[0].dtype), weights, *stacks)


class _Work(NamedTuple):
    """The pairs to compute, by expert: (column of the weights, tokens). `keeps`: backward follows."""

    network: Network
    by_expert: list[tuple[int, Tensor]]
    gradients: StackGradients
    keeps: bool


class _Mix(torch.autograd.Function):
    """All inputs get a gradient, zero where no token uses an expert: backward is the same graph on each rank."""

    @staticmethod
    def forward(ctx: Any, work: _Work, x: Tensor, weights: Tensor, *stacks: Tensor) -> Tensor:
        ctx.work, ctx.hidden = work, []
        ctx.save_for_backward(x, weights, *stacks)
        mixed = torch.zeros_like(x)
        for column, users in work.by_expert:
            row = x.index_select(0, users)
            hidden = [_linear(row, stacks, layer, column) for layer in work.network.inputs]
            result = _linear(work.network.activation(*hidden), stacks, work.network.output, column)
            mixed.index_add_(0, users, result.mul_(_gate(weights, column, users, x.dtype)))
            if work.keeps:
                ctx.hidden.append(hidden)
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        work: _Work = ctx.work
        x, weights, *stacks = ctx.saved_tensors
        grads = _Gradients(torch.zeros_like(x), torch.zeros_like(weights), work.gradients.begin(stacks))
        for number, (column, users) in enumerate(work.by_expert):
            hidden, ctx.hidden[number] = ctx.hidden[number], None
            gate = _gate(weights, column, users, x.dtype)
            _backward_of_expert(work.network, stacks, (column, users), (x, gate, hidden, grad), grads)
        return None, grads.x, grads.weights, *work.gradients.end()


class _Gradients(NamedTuple):
    """The gradients of the inputs of `_Mix`, which the experts fill in turn."""

    x: Tensor
    weights: Tensor
    stacks: list[Tensor]


def _backward_of_expert(
    network: Network, stacks: Sequence[Tensor], pairs: tuple[int, Tensor],
    saved: tuple[Tensor, Tensor, list[Tensor], Tensor], grads: _Gradients,
) -> None:  # fmt: skip
    """Add the gradients of one expert, whose output is gate * (h W + b) with h = activation(hidden)."""
    (column, users), (x, gate, hidden, grad) = pairs, saved
    for tokens, gates, *parts in zip(*(each.split(ROWS) for each in (users, gate, *hidden)), strict=True):
        result_grad = grad.index_select(0, tokens)
        _backward_of_output(network, stacks, (column, tokens), (gates, parts, result_grad), grads)
    row = x.index_select(0, users)
    for (matrix, bias), hidden_grad in zip(network.inputs, hidden, strict=True):
        grads.stacks[matrix][column].addmm_(row.T, hidden_grad)
        if bias is not None:
            grads.stacks[bias][column].add_(hidden_grad.sum(0))
        grads.x.index_add_(0, users, hidden_grad @ stacks[matrix][column].T)


def _backward_of_output(
    network: Network, stacks: Sequence[Tensor], pairs: tuple[int, Tensor],
    saved: tuple[Tensor, list[Tensor], Tensor], grads: _Gradients,
) -> None:  # fmt: skip
    """Add the gradients of an expert's weights and second layer, and overwrite `hidden` with its gradient."""
    (column, tokens), (gate, hidden, result_grad) = pairs, saved
    (matrix, bias), h = network.output, network.activation(*hidden)
    h_grad = result_grad @ stacks[matrix][column].T
    gate_grad = torch.linalg.vecdot(h_grad, h)
    if bias is not None:
        gate_grad += result_grad @ stacks[bias][column]
    grads.weights[:, column].index_copy_(0, tokens, gate_grad.to(grads.weights.dtype))
    weighted = result_grad.mul_(gate)
    grads.stacks[matrix][column].addmm_(h.T, weighted)
    if bias is not None:
        grads.stacks[bias][column].add_(weighted.sum(0))
    network.backward(h_grad.mul_(gate), *hidden)


def _linear(rows: Tensor, stacks: Sequence[Tensor], layer: tuple[int, int | None], column: int) -> Tensor:
    matrix, bias = layer
    if bias is None:
        return rows @ stacks[matrix][column]
    return torch.addmm(stacks[bias][column], rows, stacks[matrix][column])


def _gate(weights: Tensor, column: int, users: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights (n, 1) of the tokens of an expert, in the dtype of the tokens."""
    return weights[:, column].index_select(0, users).to(dtype)[:, None]
