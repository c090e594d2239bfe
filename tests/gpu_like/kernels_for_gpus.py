"""Compiles the Triton kernels of merged experts for GPUs that this machine need not have. Prints the bytes of machine code."""

from __future__ import annotations

import json

from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sdit.model.moe.kernels import merged

SIZES = ("rows", "inner", "columns", "experts", "w_expert", "w_inner", "w_column", "samples")
MIX = {"HAS_BIAS": True, "TOKENS": merged.TOKENS, "COLUMNS": merged.COLUMNS, "INNER": merged.INNER}
GRAD = {"SIDE": merged.SIDE, "STEP": merged.STEP}


def code_bytes(kernel: object, constants: dict[str, object], dtype: str, capability: int) -> int:
    """The size of the machine code of a kernel for tensors of one dtype."""
    names = kernel.arg_names  # type: ignore[attr-defined]
    types = {name: "i32" if name in SIZES else f"*{dtype}" for name in names}
    if "grad_gates" in types:
        types["grad_gates"] = "*fp32"
    precision = {"PRECISION": "ieee"}
    types |= {name: "constexpr" for name in (constants | precision)}
    source = ASTSource(
        fn=kernel, signature=types, constexprs={(names.index(n),): v for n, v in (constants | precision).items()}
    )
    return len(compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"])


if __name__ == "__main__":
    kernels = ((merged._mix_kernel, MIX), (merged._grad_experts_kernel, GRAD))
    sizes = [
        code_bytes(kernel, constants, dtype, capability)
        for kernel, constants in kernels for dtype in ("bf16", "fp32") for capability in (80, 90)
    ]  # fmt: skip
    print(json.dumps(sizes))
