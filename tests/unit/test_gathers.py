"""Who collects a value from all ranks, or sends one to all: a rank then receives as many values as there are ranks.

A run does so only while it starts, because the time and the memory grow with the ranks. Later it uses sums, extremes, reports of
the first ranks, exchanges of few ranks, and files that rank 0 reads.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
COLLECTING = {
    "gather", "interleave", "all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_object",
    "gather_object", "scatter_object_list", "broadcast_object_list",
}  # fmt: skip
OF_TENSORS = {
    ("sdit/model/moe/gate.py", "sparse_gates"),
    ("sdit/interop/diffusers_files/sdit_transformer.py", "forward"),
}
LEGAL = {
    # The start of a run, or of a process.
    ("sdit/checkpoint/node_files.py", "__init__"): "hosts of all ranks, once",
    ("sdit/cli/training_rank.py", "run"): "ranks of each node",
    ("sdit/distributed/engine.py", "gather_from_replicas"): "shards of the ranks with the same experts, once",
    ("sdit/train/expert_size.py", "with_fastest_size"): "ranks of each node",
    ("sdit/train/initial_weights.py", "read_initial_weights"): "whether all ranks have read the same file",
    ("sdit/train/rundata.py", "check_same_on_all_ranks"): "fingerprints of the data",
    # The ranks of one expert group.
    ("sdit/expert_parallel/dispatcher.py", "compute"): "rows of a group",
}
COMMANDS = ("sdit/doctor/", "sdit/cli/doctor.py", "sdit/distributed/fabric.py", "sdit/evaluate/")  # no runs
HOME = "sdit/distributed/comm.py"


def collecting_calls(file: Path) -> set[str]:
    """Return the names of the functions in a file that call a method or function of `COLLECTING`."""
    found = set()
    for function in ast.walk(ast.parse(file.read_text())):
        if isinstance(function, ast.FunctionDef):
            calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
            names = {call.attr for call in calls if isinstance(call, ast.Attribute)}
            found |= {function.name} if names & COLLECTING else set()
    return found


def test_a_run_collects_values_of_all_ranks_only_while_it_starts() -> None:
    found = set()
    for file in (ROOT / "sdit").rglob("*.py"):
        name = str(file.relative_to(ROOT))
        if name != HOME and not name.startswith(COMMANDS):
            found |= {(name, function) for function in collecting_calls(file)}
    assert found - OF_TENSORS == set(LEGAL)
