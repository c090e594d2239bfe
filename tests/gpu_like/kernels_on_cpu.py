"""Runs the Triton kernels of merged experts in Triton's interpreter (TRITON_INTERPRET=1) and prints their errors as JSON."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from sdit.model.moe import merged
from sdit.model.moe.kernels import merged as kernels

SHAPES = {  # samples, tokens, input width, output width, experts; none is a multiple of a tile
    "square": (3, 20, 24, 24, 4),
    "wide": (2, 130, 40, 72, 3),
    "one row of gates": (1, 150, 24, 24, 4),
}


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs with two experts per sample."""
    samples, tokens, inner, columns, experts = shape
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(samples, experts, generator=generator) + 0.1
    gates = torch.zeros_like(scores).scatter(1, (top := scores.topk(2)).indices, top.values)
    drawn = {
        "z": torch.randn(samples, tokens, inner, generator=generator),
        "grad": torch.randn(samples, tokens, columns, generator=generator),
        "gates": gates,
        "w": torch.randn(experts, inner, columns, generator=generator) * inner**-0.5,
        "b": torch.randn(experts, columns, generator=generator),
    }
    return {name: value.to(dtype) for name, value in drawn.items()}


def compute(module: object, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mixture and all gradients by the functions of a module."""
    of_gates, of_w, of_b = module.grad_experts(x["grad"], x["z"], x["gates"], x["w"], x["b"])  # type: ignore[attr-defined]
    return {
        "mixture": module.mix(x["z"], x["gates"], x["w"], x["b"]),  # type: ignore[attr-defined]
        "grad z": module.grad_tokens(x["grad"], x["gates"], x["w"]),  # type: ignore[attr-defined]
        "grad gates": of_gates * (x["gates"] != 0),  # top-k discards the gradients of unused gates
        "grad w": of_w,
        "grad b": of_b,
    }


def errors(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> dict[str, float]:
    """The largest error of each result against float64 on the same inputs, over the largest value."""
    x = draw(shape, seed, dtype)
    ours, truth = compute(kernels, x), compute(merged, {name: value.double() for name, value in x.items()})
    return {name: float((ours[name].double() - truth[name]).abs().max() / truth[name].abs().max()) for name in truth}


if __name__ == "__main__":
    dtypes = {"float32": torch.float32, "float16": torch.float16}  # the interpreter cannot compute in bfloat16
    print(json.dumps({d: {name: errors(shape, 1, dtypes[d]) for name, shape in SHAPES.items()} for d in dtypes}))
