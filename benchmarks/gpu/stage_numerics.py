"""Numbers of the device against float64 on the CPU: expert products, whole models and their gradients, collectives."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from rows import NAMES, Machine, Row, limited, relative_error
from small_run import comm_of_one
from torch import Tensor, nn

from sdit.config import ExpertsConfig
from sdit.diffusion import build_objective
from sdit.model import build_experts, build_model, init_weights
from sdit.model.moe.gate import sparse_gates

# Rounding of a sum of n products grows as sqrt(n) of the unit roundoff; n is at most 4,096 here, and a model adds depth.
LIMITS = {torch.float32: 64 * 2.0**-24, torch.bfloat16: 2 * 2.0**-8}
MODEL_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def measure(machine: Machine) -> list[Row]:
    """Relative errors, each with its limit."""
    torch.manual_seed(0)
    rows = list(expert_rows(machine))
    for variant, kind in (("dit", "linear"), ("dtr", "linear"), ("switch", "linear"), ("switch", "mlp")):
        rows += model_rows(machine, variant, kind)
    with comm_of_one(machine) as comm:
        empty, values = torch.empty(0, device=comm.device), torch.arange(8.0, device=comm.device)
        received = torch.empty_like(values)
        dist.all_to_all_single(received, values)
        dist.all_to_all_single(empty.clone(), empty)
        total = comm.sum(values.double().clone())
        rows.append(limited("collectives of one rank, empty ones included", relative_error(received, total), "", 0))
    return rows


def expert_rows(machine: Machine) -> Iterator[Row]:
    """Merged linear experts and MLP experts, forward and backward."""
    samples, tokens, width = (4, 8, 32) if machine.is_tiny else (16, 64, 384)
    for kind in ("linear", "mlp"):
        experts = build_experts(ExpertsConfig(count=4, top_k=2, kind=kind), width).double()  # type: ignore[arg-type]
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=width**-0.5)
        probs = torch.rand(samples, 4, dtype=torch.float64).softmax(1)
        gates = sparse_gates(probs[None], probs.topk(2).indices[None], None)[0]
        z = torch.randn(samples, tokens, width, dtype=torch.float64)
        for dtype in (torch.float32, torch.bfloat16):
            rounded = [value.to(dtype) for value in (z, gates, *experts.parameters())]
            exact = gradients(experts, [value.double() for value in rounded])
            found = gradients(experts, [value.to(machine.device) for value in rounded])
            error = max(relative_error(*pair) for pair in zip(found, exact, strict=True))
            yield limited(f"{kind} experts, forward and backward, {NAMES[dtype]}", error, "", LIMITS[dtype])


def gradients(experts: nn.Module, values: list[Tensor]) -> list[Tensor]:
    """The mixture for tokens, gates and parameters, and its gradients by them. Gates that are zero are not compared."""
    z, gates, *parameters = leaves = [value.detach().requires_grad_() for value in values]
    names = [name for name, _ in experts.named_parameters()]
    mixed = torch.func.functional_call(experts, dict(zip(names, parameters, strict=True)), (z, gates))
    mixed.square().sum().backward()
    of_tokens, of_gates, *others = (leaf.grad for leaf in leaves if leaf.grad is not None)
    return [mixed, of_tokens, of_gates * (gates != 0), *others]


def model_rows(machine: Machine, variant: str, kind: str) -> Iterator[Row]:
    """Loss and gradient of a model, against float64."""
    model = build_model(
        {"variant": variant, "depth": 2, "width": 64, "heads": 4, "patch_size": 2, "input_size": 8, "channels": 4,
         "classes": 10, "experts": {"count": 4, "top_k": 2, "kind": kind}}
    )  # fmt: skip
    init_weights(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter)).copy_(parameter.bfloat16())
    x0, noise = torch.randn(2, 8, 4, 8, 8).bfloat16().double()
    t, y = torch.arange(0, 1000, 125), torch.arange(8)

    def result(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        model.zero_grad()
        model.to(device, dtype)
        inputs = (x0.to(device), t.to(device), y.to(device), noise.to(device))
        parts = build_objective({}).to(device)(model, *inputs)
        parts.loss.mean().backward()
        gradient = torch.cat([p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None])
        return [parts.loss.detach(), gradient]

    exact = result(torch.float64, torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16):
        errors = [relative_error(*pair) for pair in zip(result(dtype, machine.device), exact, strict=True)]
        name = variant if variant != "switch" else f"switch, {kind} experts"
        yield limited(f"{name}: loss, {NAMES[dtype]}", errors[0], "", MODEL_LIMITS[dtype])
        yield limited(f"{name}: gradient, {NAMES[dtype]}", errors[1], "", 2 * MODEL_LIMITS[dtype])
