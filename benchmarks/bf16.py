#!/usr/bin/env python3
"""Measure the rounding of a training step in bf16, against float64 with the same weights, on a CPU.

`as trained`: weights, tokens and condition are bf16, as under `train.precision: bf16`. `float32 tokens`: the tokens between
blocks are float32, and only products are bf16, as under torch.autocast. The error is the norm of the difference over the
norm. Gates of adaLN and experts are drawn so large that each block changes its tokens: at the start of a run they do not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from sdit.config import ModelConfig
from sdit.model import DiffusionTransformer, build_model, init_weights

GATE_STD = 0.3
MODES = {"as trained": torch.bfloat16, "float32 tokens": torch.float32}


def model_of(variant: str, depth: int, width: int, seed: int) -> DiffusionTransformer:
    """Return a model whose weights are numbers of bf16, in float32."""
    shape = {"depth": depth, "width": width, "heads": width // 64, "patch_size": 2, "input_size": 16, "classes": 10}
    model = build_model(ModelConfig.model_validate({"variant": variant, **shape}), device="cpu")
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN" in name or name.startswith("final_layer.linear"):
                parameter.normal_(std=GATE_STD if name.endswith("bias") else 0.02, generator=generator)
            if ".experts.w" in name:
                parameter.normal_(std=width**-0.5, generator=generator)  # the mixture is as large as the tokens
            parameter.copy_(parameter.bfloat16())
    return model


def step(model: DiffusionTransformer, inputs: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the prediction and the gradient of all weights, both flattened and in float64."""
    x, t, y = inputs
    context = torch.autocast("cpu", torch.bfloat16) if dtype == torch.float32 else nullcontext()
    model = model.to(dtype)
    with context:
        prediction = model(x.to(dtype), t, y).prediction
    yield prediction.detach().double().flatten()
    prediction.square().mean().backward()
    yield torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def errors(variant: str, dtype: torch.dtype, options: argparse.Namespace, seed: int) -> list[float]:
    """Return the relative errors of the prediction and of the gradient."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(options.batch, 4, 16, 16, generator=generator).bfloat16().double()
    inputs = x, torch.randint(0, 1000, (options.batch,), generator=generator), torch.arange(options.batch) % 10
    exact = step(model_of(variant, options.depth, options.width, seed), inputs, torch.float64)
    rounded = step(model_of(variant, options.depth, options.width, seed), inputs, dtype)
    return [float((a - b).norm() / a.norm()) for a, b in zip(exact, rounded, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=28, help="blocks (default: 28, as XL)")
    parser.add_argument("--width", type=int, default=256, help="D, a multiple of 64 (default: 256)")
    parser.add_argument("--batch", type=int, default=4, help="samples (default: 4)")
    parser.add_argument("--seeds", type=int, default=3, help="models measured; the median is printed (default: 3)")
    options = parser.parse_args()
    print("| model | arithmetic | prediction | gradient |\n|---|---|---|---|")
    for variant in ("dit", "switch"):
        for mode, dtype in MODES.items():
            found = [errors(variant, dtype, options, seed) for seed in range(options.seeds)]
            prediction, gradient = (statistics.median(column) for column in zip(*found, strict=True))
            print(f"| {variant} | {mode} | {prediction:.2%} | {gradient:.2%} |", flush=True)


if __name__ == "__main__":
    main()
