"""What the import linter cannot see: imports by name, and what a process that only waits for ranks loads."""

from __future__ import annotations

import ast
from pathlib import Path

import grimp
import pytest

from sdit import cli

ROOT = Path(__file__).parents[2]
DISPATCHER = "sdit/cli/__init__.py"


def imports_by_name(file: Path) -> list[str]:
    """Return the calls in a file that import a module whose name is only known at run time."""
    calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    return [ast.unparse(call) for call in calls if ast.unparse(call).split(".")[-1] in ("import_module", "__import__")]


def test_only_the_dispatcher_imports_by_name() -> None:
    files = [file for folder in ("sdit", "launcher") for file in (ROOT / folder).rglob("*.py")]
    found = {str(file.relative_to(ROOT)): imports_by_name(file) for file in files}
    assert {name: calls for name, calls in found.items() if calls} == {DISPATCHER: ["importlib.import_module"]}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("sdit", cache_dir=None)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_no_command_imports_the_dispatcher(graph: grimp.ImportGraph, verb: str) -> None:
    assert graph.find_shortest_chain(f"sdit.cli.{verb}", "sdit.cli") is None
    assert graph.find_shortest_chain(f"sdit.cli.{verb}", "sdit.cli.process")
