"""Published names of token-routed experts, which sdit holds as stacks. M experts, D width, d channels of a head.

A published model has a matrix per expert, (out, in). The stacks are (M, in, out).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from sdit.config import ModelConfig

STACK = re.compile(r"(blocks\.\d+\.moe\.experts)\.(\w+)")
LEAVES = {
    "gate_proj": "gate_proj.weight", "up_proj": "up_proj.weight", "down_proj": "down_proj.weight",
    "w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias",
}  # fmt: skip
DSMOE = re.compile(r"blocks\.\d+\.mlp\.experts\.blocks\.\d+\.")
RENAMES = (  # names of DSMoE, of EC-DiT in DiffMoE's code, and of DiT-MoE with flash attention
    (re.compile(r"(blocks\.\d+)\.mlp\.experts\.(?:blocks\.)?(\d+\.)"), r"\1.moe.experts.\2"),
    (re.compile(r"(blocks\.\d+)\.mlp\.(gate|shared_experts)\."), r"\1.moe.\2."),
    (re.compile(r"(blocks\.\d+)\.mlp\.gate_weight"), r"\1.moe.gate.weight"),
    (re.compile(r"(blocks\.\d+)\.attn\.Wqkv\."), r"\1.attn.qkv."),
    (re.compile(r"(blocks\.\d+)\.attn\.out_proj\."), r"\1.attn.proj."),
)
QKV = re.compile(r"blocks\.\d+\.attn\.qkv\.(weight|bias)")


def published_expert_name(parameter: str, expert: int) -> str | None:
    """Return the published name of one row of a stack of token-routed experts. None: the parameter is published as it is."""
    match = STACK.fullmatch(parameter)
    return None if match is None else f"{match[1]}.{expert}.{LEAVES[match[2]]}"


def without_moe_names(config: ModelConfig, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of DiT-MoE, DSMoE or EC-DiT under the names of sdit, and all others as they are.

    DSMoE turns the channels j and j + a/2 of each half of a = d/2 channels of a head. Its queries and keys are reordered.
    """
    renamed = {_renamed(name): values for name, values in given.items()}
    if not config.rope or not any(DSMOE.match(name) for name in given):
        return renamed
    return {
        name: _interleave(values, config.heads) if QKV.fullmatch(name) and len(values) == 3 * config.width else values
        for name, values in renamed.items()
    }


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _interleave(qkv: Tensor, heads: int) -> Tensor:
    """Return the rows (3 D, ...) of queries, keys and values, with row 2j of a half theirs j, and 2j + 1 theirs j + a/2."""
    query_key, value = qkv[: 2 * len(qkv) // 3], qkv[2 * len(qkv) // 3 :]
    pairs = query_key.unflatten(0, (2 * heads, 2, 2, -1))  # of a head: halves, then members of a pair, then pairs
    return torch.cat([pairs.transpose(2, 3).flatten(0, 3), value])
