"""Numbers of the device against float64 on the CPU: products of experts, models, gates, prior, averages, collectives."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import torch
import torch.distributed as dist
from rows import NAMES, Machine, Row, limited, relative_error
from small_run import comm_of_one
from torch import Tensor, nn

from sdit.config import ExpertsConfig, MoeConfig
from sdit.contracts import Routing
from sdit.diffusion import build_objective
from sdit.model import Experts, build_experts, build_model, init_weights, prior_divergence, solve_assignment
from sdit.model.moe.base import ExpertRows
from sdit.model.moe.experts import build_token_experts
from sdit.model.moe.gate import sparse_gates
from sdit.model.moe.grouped import pairs_of_rows
from sdit.model.moe.token_products import mix_tokens

# Rounding of a sum of n products grows as sqrt(n) of the unit roundoff; n is at most 4,096 here, and a model adds depth.
LIMITS = {torch.float32: 64 * 2.0**-24, torch.bfloat16: 2 * 2.0**-8}
MODEL_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def measure(machine: Machine) -> list[Row]:
    """Relative errors, each with its limit."""
    torch.manual_seed(0)
    rows = list(expert_rows(machine))
    for variant, kind in (("dit", "linear"), ("dtr", "linear"), ("switch", "linear"), ("switch", "mlp")):
        rows += model_rows(machine, variant, kind)
    rows += [*token_rows(machine), *gate_rows(machine)]
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


def token_rows(machine: Machine) -> Iterator[Row]:
    """Token-routed experts for given routes, forward and backward."""
    count, width = (24, 32) if machine.is_tiny else (1024, 384)
    for kind in ("mlp", "swiglu"):
        experts = build_token_experts(MoeConfig(experts=4, kind=kind), width).double()  # type: ignore[arg-type]
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=width**-0.5)
        chosen = torch.rand(count, 4).topk(2).indices
        weights = torch.zeros(count, 4, dtype=torch.float64).scatter(1, chosen, torch.rand(count, 2).double() + 0.5)
        x = torch.randn(count, width, dtype=torch.float64)
        for dtype in (torch.float32, torch.bfloat16):
            rounded = [value.to(dtype) for value in (x, weights, *experts.parameters())]
            exact = token_gradients(experts, [value.double() for value in rounded], chosen)
            found = token_gradients(experts, [value.to(machine.device) for value in rounded], chosen.to(machine.device))
            error = max(relative_error(*pair) for pair in zip(found, exact, strict=True))
            yield limited(
                f"token-routed {kind} experts, forward and backward, {NAMES[dtype]}", error, "", LIMITS[dtype]
            )


def token_gradients(experts: Experts, values: list[Tensor], chosen: Tensor) -> list[Tensor]:
    """The sums for tokens, weights and parameters, and their gradients. `chosen` (n, k) are the columns of the weights."""
    x, weights, *parameters = leaves = [value.detach().requires_grad_() for value in values]
    experts = deepcopy(experts).to(x.device, x.dtype)
    leaves[2:] = list(experts.parameters())
    with torch.no_grad():
        for own, value in zip(leaves[2:], parameters, strict=True):
            own.copy_(value)
    mixed = mix_tokens(experts, x, weights, ExpertRows(None, pairs_of_rows(chosen, weights.shape[1]), None))
    mixed.square().sum().backward()
    of_tokens, of_weights, *others = (leaf.grad for leaf in leaves if leaf.grad is not None)
    return [mixed, of_tokens, of_weights * (weights != 0), *others]


def gate_rows(machine: Machine) -> Iterator[Row]:
    """The gates of a batch against those of all tasks, the prior's divergence, and an average of the weights."""
    model = build_model(
        {"variant": "switch", "depth": 2, "width": 64, "heads": 4, "input_size": 8, "learn_variance": False}
    )
    init_weights(model, 0)
    exact = model.all_gate_probs()
    model.to(machine.device)
    task = torch.arange(0, 1000, 37, device=machine.device)
    table, batch = model.all_gate_probs(), model.gate_probs(task)
    chosen = [probs.topk(model.config.experts.top_k).indices for probs in (table[:, task], batch)]
    differing = float((chosen[0] != chosen[1]).any(-1).sum())
    yield limited("gates: tasks that choose other experts in a batch than in the table", differing, "", 0)
    assignment = solve_assignment(exact, model.config)
    divergences = [
        prior_divergence(Routing(task.to(probs.device), probs, probs.topk(2).indices), assignment)
        for probs in (batch.detach(), batch.detach().double().cpu())
    ]
    yield limited("prior's divergence, float32", relative_error(*divergences), "", 1e-5)
    average, weights = torch.randn(2, 1000, device=machine.device)
    expected = average.double() + 1e-4 * (weights.double() - average.double())
    torch._foreach_lerp_([average], [weights], 1e-4)
    yield limited("average of the weights, float32", relative_error(average, expected), "", LIMITS[torch.float32])


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
