"""Experts of two linear layers. B samples, L tokens, D width, H hidden width, M experts of the block, M_local local ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdit.model.moe.base import NONE, ExpertRows, Experts
from sdit.model.moe.grouped import grouped_mlp, has_grouped_product, sort_pairs

Stacks = tuple[Tensor, ...]  # the parameters of all experts, in the order of STACKS
STACKS = ("w1", "b1", "w2", "b2")


class MlpExperts(Experts):
    """Two-layer GELU experts. Each runs on the samples that use it, k of them per sample."""

    def __init__(self, width: int, hidden: int, top_k: int, ids: Sequence[int]) -> None:
        super().__init__(ids)
        self.top_k = min(top_k, len(ids))
        self.w1 = nn.Parameter(torch.empty(len(ids), width, hidden))
        self.b1 = nn.Parameter(torch.empty(len(ids), hidden))
        self.w2 = nn.Parameter(torch.empty(len(ids), hidden, width))
        self.b2 = nn.Parameter(torch.empty(len(ids), width))

    def forward(self, z: Tensor, gates: Tensor) -> Tensor:
        """Return the mixture (B, L, D) of z (B, L, D). Each expert runs once, on the samples that use it.

        Without a grouped product, the host waits for the gates of a GPU.
        """
        z = z.to(self.w1.dtype)
        if z.device.type != "cpu" and len(gates) == 1:
            return self._shared(z, gates)
        if self._is_grouped():
            return grouped_mlp(z, gates, sort_pairs(gates, self.top_k), self._stacks())
        used = (gates.detach() != 0).expand(len(z), -1).cpu()
        gate_of = gates.to(z.dtype).expand(len(z), -1).unbind(1)
        out = torch.zeros_like(z)
        for expert, gate, row in zip(_functions(_rows(self._stacks())), gate_of, used.unbind(1), strict=True):
            samples = row.nonzero().squeeze(1).to(z.device)
            if len(samples):
                out.index_add_(0, samples, expert(z[samples]) * gate[samples, None, None])
        return out

    def mix(self, z: Tensor, weights: Tensor, rows: ExpertRows, replicas: Mapping[str, Tensor] = NONE) -> Tensor:
        """Return the weighted sum (n, L, D) of the experts in `rows` for z (n, L, D), local experts and `replicas`."""
        mix = _mix_grouped if self._is_grouped() else _mix_by_expert
        return mix(
            z.to(self.w1.dtype), weights, rows, self._stacks(), tuple(replicas[name] for name in STACKS if replicas)
        )

    def _stacks(self) -> Stacks:
        return self.w1, self.b1, self.w2, self.b2

    def _is_grouped(self) -> bool:
        return has_grouped_product(self.w1.device, self.w1.dtype, self.w1.shape[1:])

    def _shared(self, z: Tensor, gates: Tensor) -> Tensor:
        """Return the mixture (B, L, D) of experts that all samples use, for gates (1, M). The host waits for nothing."""
        gate, chosen = gates[0].to(z.dtype).topk(self.top_k)
        experts = _functions(_rows([stack.index_select(0, chosen) for stack in self._stacks()]))
        return torch.stack([expert(z) * gate[j] for j, expert in enumerate(experts)]).sum(0)


class _Rows:
    """The rows of a stack (M, ...). Each gradient of a row is copied into that of the stack when it is computed.

    The gradient of `stack.unbind()` is a copy that is made when all rows have theirs, which needs twice the memory. That of
    an index such as stack[j] is a stack for each row.
    """

    def __init__(self, stack: Tensor) -> None:
        self._gradient = _StackGradient()
        self._rows: tuple[Tensor, ...] = _Unbind.apply(stack, self._gradient)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tensor:
        """Return a row, just before it is used: backward runs the node that is made here after the use, and before others."""
        row: Tensor = _Row.apply(self._rows[index], self._gradient, index, len(self._rows))
        return row


class _StackGradient:
    """The gradient of a stack (M, ...), as far as backward has reached its rows. It is zero where a row is unused."""

    def __init__(self) -> None:
        self._stack: Tensor | None = None
        self._arrived: set[int] = set()

    def put(self, row: Tensor, index: int, count: int) -> None:
        """Add a gradient to that of row `index` of `count`."""
        if self._stack is None:
            self._stack = row.new_zeros((count, *row.shape))
        if index in self._arrived:
            self._stack[index] += row
        else:
            self._stack[index] = row
            self._arrived.add(index)

    def take(self) -> Tensor | None:
        """Return the gradient, and start again."""
        stack, self._stack, self._arrived = self._stack, None, set()
        return stack


class _Unbind(torch.autograd.Function):
    """Returns the rows of a stack. Its gradient is what `_Row` has put into `gradient`."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, gradient: _StackGradient) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.gradient = gradient
        return stack.unbind()

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, None]:
        return ctx.gradient.take(), None


class _Row(torch.autograd.Function):
    """Returns its input, row `index` of a stack. What it passes on in backward has the right shape and no memory."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, gradient: _StackGradient, index: int, count: int) -> Tensor:
        ctx.gradient, ctx.index, ctx.count = gradient, index, count
        return row.view_as(row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.gradient.put(grad, ctx.index, ctx.count)
        return grad.new_empty(()).expand(grad.shape), None, None, None


def _rows(stacks: Sequence[Tensor]) -> list[_Rows]:
    return [_Rows(stack) for stack in stacks]


def _functions(stacks: Sequence[_Rows]) -> list[partial[Tensor]]:
    """Return the experts as functions of tokens (n, L, D), without gates."""
    return [partial(_mlp, stacks=stacks, expert=j) for j in range(len(stacks[0]))]


def _mlp(z: Tensor, stacks: Sequence[_Rows], expert: int) -> Tensor:
    w1, b1, w2, b2 = (rows[expert] for rows in stacks)
    return F.gelu(z @ w1 + b1, approximate="tanh") @ w2 + b2


def _mix_by_expert(tokens: Tensor, weights: Tensor, rows: ExpertRows, local: Stacks, replicas: Stacks) -> Tensor:
    """Return the mixture (n, L, D) by a loop over the experts that some row uses."""
    own = _rows(local)
    functions = _functions(own) + (_functions(_rows(replicas)) if replicas else [])
    mixed = torch.zeros_like(tokens)
    for column, users in rows.by_expert():
        gate = weights[:, column].index_select(0, users).to(tokens.dtype)
        mixed.index_add_(0, users, functions[column](tokens.index_select(0, users)) * gate[:, None, None])
    # One local expert is enough, because its rows belong to the same parameters as those of the others.
    return _depend_on_unused(mixed, rows, (tokens, weights), [rows_of[0] for rows_of in own], replicas)


def _mix_grouped(tokens: Tensor, weights: Tensor, rows: ExpertRows, local: Stacks, replicas: Stacks) -> Tensor:
    """Return the mixture (n, L, D) by grouped products of the local experts, and of the replicas."""
    own = _InOneNode.apply(*local)
    columns, pairs = len(own[0]), sum(rows.counts[: len(own[0])])
    mixed = torch.zeros_like(tokens)
    if pairs:
        first = rows.pairs.part(slice(columns), slice(pairs))
        mixed = grouped_mlp(tokens, weights[:, :columns], first, own)
    if pairs < len(rows.pairs.rows):
        last = rows.pairs.part(slice(columns, None), slice(pairs, None))
        mixed = mixed + grouped_mlp(tokens, weights[:, columns:], last, replicas)
    return _depend_on_unused(mixed, rows, (tokens, weights), own, replicas)


def _depend_on_unused(
    mixed: Tensor, rows: ExpertRows, inputs: Sequence[Tensor], local: Sequence[Tensor], replicas: Sequence[Tensor]
) -> Tensor:
    """Return `mixed`. Inputs that it does not use get zero gradients: tokens and weights, local experts, or replicas."""
    columns = len(rows.counts) - (len(replicas[0]) if replicas else 0)
    uses_local, uses_replicas = any(rows.counts[:columns]), any(rows.counts[columns:])
    unused = [] if uses_local or uses_replicas else list(inputs)
    unused += [] if uses_local else local
    unused += [] if uses_replicas else replicas
    return _Depend.apply(mixed, *unused) if unused else mixed


class _Depend(torch.autograd.Function):
    """Returns `result`. The unused inputs get zero gradients.

    Backward must run the same transfers and reduce the same gradients, in the same order, on each rank. If no sample
    uses an expert, a rank would otherwise skip a send that other ranks wait for. Or it would fill ZeRO's bucket in
    another order, and gradients of different parameters would be added.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, *unused: Tensor) -> Tensor:
        ctx.shapes = [(value.shape, value.dtype, value.device) for value in unused]
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes)


class _InOneNode(torch.autograd.Function):
    """Returns its inputs. Their gradients arrive together and are passed on in this order, for any use of the inputs."""

    @staticmethod
    def forward(ctx: Any, *stacks: Tensor) -> Stacks:
        return tuple(stack.view_as(stack) for stack in stacks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Stacks:
        return grads
