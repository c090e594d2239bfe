"""Experts that run on the rows that use them. B samples, L tokens, D width, H hidden width, M_local local experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdit.model.feed_forward import silu_times
from sdit.model.moe.base import NONE, ExpertRows, Experts, ParameterRows
from sdit.model.moe.grouped import SortedPairs, grouped_mlp, grouped_swiglu, has_grouped_product, sort_pairs

Stacks = tuple[Tensor, ...]  # the parameters of all experts, in the order of `StackedExperts.stacks`


class StackedExperts(Experts):
    """Experts that are networks of their own. Each runs on the samples that use it, k of them per sample.

    `stacks` are the names of the parameters.
    """

    stacks: ClassVar[tuple[str, ...]]

    @staticmethod
    def expert(z: Tensor, stacks: Stacks) -> Tensor:
        """Return the output (n, L, D) of one expert for z (n, L, D). `stacks` are its rows of the parameters."""
        raise NotImplementedError

    @staticmethod
    def grouped(z: Tensor, weights: Tensor, pairs: SortedPairs, stacks: Stacks) -> Tensor:
        """Return the weighted sum (n, L, D) of all experts for z (n, L, D) by grouped products."""
        raise NotImplementedError

    def __init__(self, top_k: int, ids: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__(ids)
        self.top_k = min(top_k, len(ids))
        for name, shape in zip(self.stacks, shapes, strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(len(ids), *shape)))

    def forward(self, z: Tensor, gates: Tensor) -> Tensor:
        """Return the mixture (B, L, D) of z (B, L, D). Each expert runs once, on the samples that use it.

        Without a grouped product, the host waits for the gates of a GPU.
        """
        stacks = self._stacks()
        z = z.to(stacks[0].dtype)
        if z.device.type != "cpu" and len(gates) == 1:
            return self._shared(z, gates)
        if self.is_grouped():
            return self.grouped(z, gates, sort_pairs(gates, self.top_k), stacks)
        used = (gates.detach() != 0).expand(len(z), -1).cpu()
        gate_of = gates.to(z.dtype).expand(len(z), -1).unbind(1)
        out = torch.zeros_like(z)
        for expert, gate, row in zip(self._functions(_rows(stacks)), gate_of, used.unbind(1), strict=True):
            samples = row.nonzero().squeeze(1).to(z.device)
            if len(samples):
                out.index_add_(0, samples, expert(z[samples]) * gate[samples, None, None])
        return out

    def parameter_rows(self) -> ParameterRows:
        """Return the rows of each parameter, or the parameters themselves for grouped products."""
        return _InOneNode.apply(*self._stacks()) if self.is_grouped() else _rows(self._stacks())

    def mix(
        self, z: Tensor, weights: Tensor, rows: ExpertRows, replicas: Mapping[str, Tensor] = NONE,
        local: ParameterRows | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the weighted sum (n, L, D) of the experts in `rows` for z (n, L, D), local experts and `replicas`."""
        own = self.parameter_rows() if local is None else local
        mix = self._mix_grouped if self.is_grouped() else self._mix_by_expert
        z = z.to(self._stacks()[0].dtype)
        return mix(z, weights, rows, own, tuple(replicas[name] for name in self.stacks if replicas))

    def _stacks(self) -> Stacks:
        return tuple(getattr(self, name) for name in self.stacks)

    def is_grouped(self) -> bool:
        """Return True if the experts run as grouped products."""
        first = self._stacks()[0]
        return has_grouped_product(first.device, first.dtype, first.shape[1:])

    def _shared(self, z: Tensor, gates: Tensor) -> Tensor:
        """Return the mixture (B, L, D) of experts that all samples use, for gates (1, M). The host waits for nothing."""
        gate, chosen = gates[0].to(z.dtype).topk(self.top_k)
        experts = self._functions(_rows([stack.index_select(0, chosen) for stack in self._stacks()]))
        return torch.stack([expert(z) * gate[j] for j, expert in enumerate(experts)]).sum(0)

    def _functions(self, rows: ParameterRows) -> list[partial[Tensor]]:
        """Return the experts, whose parameters are `rows`, as functions of tokens (n, L, D), without gates."""
        return [partial(self.expert, stacks=row) for row in zip(*rows, strict=True)]

    def _mix_by_expert(
        self, tokens: Tensor, weights: Tensor, rows: ExpertRows, local: ParameterRows, replicas: Stacks
    ) -> Tensor:
        """Return the mixture (n, L, D) by a loop over the experts that some row uses."""
        own = self._functions(local)
        functions = own + (self._functions(_rows(replicas)) if replicas else [])
        mixed = torch.zeros_like(tokens)
        for column, users in rows.by_expert():
            gate = weights[:, column].index_select(0, users).to(tokens.dtype)
            mixed.index_add_(0, users, functions[column](tokens.index_select(0, users)) * gate[:, None, None])
        # One local expert is enough, because its rows belong to the same parameters as those of the others.
        return _depend_on_unused(mixed, rows, (tokens, weights), own[0].keywords["stacks"], replicas)

    def _mix_grouped(self, tokens: Tensor, weights: Tensor, rows: ExpertRows, own: Stacks, replicas: Stacks) -> Tensor:
        """Return the mixture (n, L, D) by grouped products of the local experts, and of the replicas."""
        if rows.counts is None:
            return self.grouped(tokens, weights, rows.pairs, own)
        columns, pairs = len(own[0]), sum(rows.counts[: len(own[0])])
        mixed = torch.zeros_like(tokens)
        if pairs:
            first = rows.pairs.part(slice(columns), slice(pairs))
            mixed = self.grouped(tokens, weights[:, :columns], first, own)
        if pairs < len(rows.pairs.rows):
            last = rows.pairs.part(slice(columns, None), slice(pairs, None))
            mixed = mixed + self.grouped(tokens, weights[:, columns:], last, replicas)
        return _depend_on_unused(mixed, rows, (tokens, weights), own, replicas)


class MlpExperts(StackedExperts):
    """Experts of two linear layers with biases, and GELU between them."""

    stacks = ("w1", "b1", "w2", "b2")
    grouped = staticmethod(grouped_mlp)

    def __init__(self, width: int, hidden: int, top_k: int, ids: Sequence[int]) -> None:
        super().__init__(top_k, ids, ((width, hidden), (hidden,), (hidden, width), (width,)))

    @staticmethod
    def expert(z: Tensor, stacks: Stacks) -> Tensor:
        """Return GELU(z W1 + b1) W2 + b2."""
        w1, b1, w2, b2 = stacks
        return F.gelu(z @ w1 + b1, approximate="tanh") @ w2 + b2


class SwiGluExperts(StackedExperts):
    """Gated experts without biases: (SiLU(z G) * z U) V."""

    stacks = ("gate_proj", "up_proj", "down_proj")
    grouped = staticmethod(grouped_swiglu)

    def __init__(self, width: int, hidden: int, top_k: int, ids: Sequence[int]) -> None:
        super().__init__(top_k, ids, ((width, hidden), (width, hidden), (hidden, width)))

    @staticmethod
    def expert(z: Tensor, stacks: Stacks) -> Tensor:
        """Return (SiLU(z G) * z U) V."""
        gate, up, down = stacks
        return silu_times(z @ gate, z @ up) @ down


def _rows(stacks: Sequence[Tensor]) -> ParameterRows:
    """Return the rows of each parameter (n, ...).

    They come from `unbind`. The gradient of an index such as w1[j] would allocate M matrices for each expert.
    """
    return tuple(stack.unbind() for stack in stacks)


def _depend_on_unused(
    mixed: Tensor, rows: ExpertRows, inputs: Sequence[Tensor], local: Sequence[Tensor], replicas: Sequence[Tensor]
) -> Tensor:
    """Return `mixed`. Inputs that it does not use get zero gradients: tokens and weights, local experts, or replicas."""
    if rows.counts is None:
        return mixed
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
