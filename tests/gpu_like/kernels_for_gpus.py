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


def code_bytes(kernel: object, constants: dict[str, object], capability: int) -> int:
    """The size of the machine code of a kernel for bfloat16."""
    names = kernel.arg_names  # type: ignore[attr-defined]
    types = {name: "i32" if name in SIZES else "*bf16" for name in names}
    if "grad_gates" in types:
        types["grad_gates"] = "*fp32"
    types |= dict.fromkeys(constants, "constexpr")
    indexed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=indexed)
    return len(compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"])


if __name__ == "__main__":
    kernels = ((merged._mix_kernel, MIX), (merged._grad_experts_kernel, GRAD))
    sizes = [code_bytes(kernel, constants, capability) for kernel, constants in kernels for capability in (80, 90)]
    print(json.dumps(sizes))
