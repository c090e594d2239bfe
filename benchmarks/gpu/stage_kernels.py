"""Expert products without a model, forward and backward: merged linear and MLP experts, as used and in their plain form."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from rows import Machine, Row
from torch import Tensor

from sdit.model.moe import merged
from sdit.model.moe.grouped import grouped_mlp, has_grouped_product, sort_pairs
from sdit.model.moe.kernels import has_triton
from sdit.model.moe.mlp_experts import MlpExperts

TOKENS, TOP_K = 256, 2


def measure(machine: Machine) -> list[Row]:
    """The rows of both kinds."""
    sizes = (
        ((2, 32, 4),)
        if machine.is_tiny
        else ((32, 384, 3), (128, 384, 16), (8, 1152, 3), (32, 1152, 3), (32, 1152, 16))
    )
    rows: list[Row] = []
    for samples, width, experts in sizes:
        rows += linear_rows(machine, samples, width, experts)
        rows += mlp_rows(machine, samples, width, experts)
        if machine.is_cuda:
            torch.cuda.empty_cache()
    return rows


def drawn(machine: Machine, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=machine.device)


def drawn_gates(machine: Machine, samples: int, experts: int) -> Tensor:
    """Gates (B, M), of which k in each row are not zero."""
    probs = torch.rand(samples, experts, device=machine.device)
    return torch.where(probs >= probs.topk(min(TOP_K, experts)).values[:, -1:], probs, 0).to(torch.bfloat16)


def linear_rows(machine: Machine, samples: int, width: int, experts: int) -> Iterator[Row]:
    """The three operators of merged experts, and one dense product of the tokens for comparison."""
    tokens = 8 if machine.is_tiny else TOKENS
    z, grad = drawn(machine, samples, tokens, width), drawn(machine, samples, tokens, width)
    gates, w, b = (
        drawn_gates(machine, samples, experts),
        drawn(machine, experts, width, width),
        drawn(machine, experts, width),
    )
    name = f"linear experts, B = {samples}, D = {width}, M = {experts}"
    ways: dict[str, tuple[Callable[..., object], Callable[..., object], Callable[..., object]]] = {
        "plain": (merged.mix, merged.grad_tokens, merged.grad_experts)
    }
    if machine.is_cuda and has_triton():
        from sdit.model.moe.kernels import merged as kernels

        ways["kernel"] = (kernels.mix, kernels.grad_tokens, kernels.grad_experts)
    yield Row(f"{name}: one product of the tokens", machine.milliseconds(lambda: z @ w[0], 20), "ms")
    for way, (mix, of_tokens, of_experts) in ways.items():
        yield Row(f"{name}: mixture, {way}", machine.milliseconds(lambda: mix(z, gates, w, b), 20), "ms")  # noqa: B023
        spent = machine.milliseconds(lambda: of_tokens(grad, gates, w), 20)  # noqa: B023
        yield Row(f"{name}: gradient of tokens, {way}", spent, "ms")
        spent = machine.milliseconds(lambda: of_experts(grad, z, gates, w, b), 20)  # noqa: B023
        yield Row(f"{name}: gradients of experts, {way}", spent, "ms")


def mlp_rows(machine: Machine, samples: int, width: int, experts: int) -> Iterator[Row]:
    """MLP experts by a loop over the experts, and by grouped products where the device has them."""
    tokens = 8 if machine.is_tiny else TOKENS
    module = MlpExperts(width, 4 * width, TOP_K, range(experts)).to(machine.device, torch.bfloat16)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=width**-0.5)
    z = drawn(machine, samples, tokens, width).requires_grad_()
    gates = drawn_gates(machine, samples, experts)
    stacks = [getattr(module, name) for name in MlpExperts.stacks]
    ways: dict[str, Callable[[], Tensor]] = {"as used": lambda: module(z, gates)}
    if has_grouped_product(machine.device, torch.bfloat16, (width, 4 * width)):
        ways["grouped"] = lambda: grouped_mlp(z, gates, sort_pairs(gates, TOP_K), stacks)
    for way, mix in ways.items():
        spent = machine.milliseconds(lambda: mix().sum().backward(), 10)  # noqa: B023
        yield Row(f"MLP experts, B = {samples}, D = {width}, M = {experts}: forward and backward, {way}", spent, "ms")
