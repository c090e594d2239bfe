"""Measures what a forward pass keeps for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdit.model import DiffusionTransformer
from sdit.model.moe import token_products


def kept_bytes(model: DiffusionTransformer, forward_pass: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """Return what `forward_pass` keeps for backward: every storage once, without weights and buffers.

    Autograd names its saved tensors. `_Mix` keeps others.
    """
    lasting = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    alive: list[Tensor] = []  # or an address would be used again
    contexts, mix = [], token_products._Mix.forward

    def forward(ctx: Any, *arguments: Any) -> Tensor:
        contexts.append(ctx)
        return mix(ctx, *arguments)

    def keep(value: Tensor) -> Tensor:
        alive.append(value)
        return value

    monkeypatch.setattr(token_products._Mix, "forward", staticmethod(forward))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        result = forward_pass()
    for ctx in contexts:
        alive += [each for hidden in ctx.hidden for each in hidden] + [users for _, users in ctx.work.by_expert]
    assert result is not None and bool(contexts) == (model.config.moe is not None)
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in alive}
    return sum(size for address, size in storages.items() if address not in lasting)
