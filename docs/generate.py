"""Write the config and metrics references into docs/generated, and check that public names have docstrings.

Exit status: 0, or 1 with one line for each public class, function or method of the Python API without a docstring.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdit.config import Config

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ROOT / "docs" / "generated"
DOCUMENTED = [ROOT / "sdit" / name for name in ("model", "diffusion", "expert_parallel", "interop")]
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def main() -> int:
    """Write the references and return the exit status."""
    GENERATED.mkdir(exist_ok=True)
    (GENERATED / "config.md").write_text(config_reference(), encoding="utf-8")
    (GENERATED / "metrics.md").write_text(metrics_reference(), encoding="utf-8")
    missing = [line for path in DOCUMENTED for line in undocumented(path)]
    for line in missing:
        print(f"error: {line} has no docstring", file=sys.stderr)
    return 1 if missing else 0


def config_reference() -> str:
    """Return one table per section of the config: each key with its type, bounds, default, unit and effect."""
    schema = Config.model_json_schema()
    lines = ["# Config reference", ""]
    lines += ["This page is generated from `sdit/config/schema.py`. `sdit train --help` prints the same keys."]
    lines += ["", "## At the top level", "", *_config_table(schema, schema, "")]
    for name, entry in schema["properties"].items():
        if "$ref" in entry:
            lines += ["", f"## {name}", "", f"{_sentence(entry['description'])}", ""]
            lines += _config_table(schema, _resolve(schema, entry), f"{name}.")
    return "\n".join(lines) + "\n"


def _config_table(schema: dict[str, Any], section: dict[str, Any], prefix: str) -> list[str]:
    rows = ["| key | type | default | unit and effect |", "|---|---|---|---|"]
    return rows + list(_config_rows(schema, section, prefix))


def _config_rows(schema: dict[str, Any], section: dict[str, Any], prefix: str) -> Iterator[str]:
    """Yield a row for each key of a section. Sections inside a section follow it; those of the top level do not."""
    for name, entry in section["properties"].items():
        if "$ref" not in entry:
            default = "null" if entry["default"] is None else str(entry["default"])
            default = default.lower() if isinstance(entry["default"], bool) else default
            yield f"| `{prefix}{name}` | {_type(entry)} | `{default}` | {_cell(entry['description'])} |"
        elif prefix:
            yield from _config_rows(schema, _resolve(schema, entry), f"{prefix}{name}.")
        for choice in entry.get("anyOf", ()):  # a section that may be null
            if "$ref" in choice:
                yield from _config_rows(schema, _resolve(schema, choice), f"{prefix}{name}.")


def _resolve(schema: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][entry["$ref"].rpartition("/")[2]]


def _type(entry: dict[str, Any]) -> str:
    """Return the legal values of a key in words, such as `integer ≥ 1 or null`."""
    if "$ref" in entry:
        return "section"
    if "anyOf" in entry:
        return " or ".join(_type(choice) for choice in entry["anyOf"])
    if "enum" in entry or "const" in entry:
        return ", ".join(f"`{value}`" for value in entry.get("enum", [entry.get("const")]))
    if entry["type"] == "array":
        return f"list of {_type(entry['items'])}"
    bounds = [f"{sign} {entry[name]:g}" for name, sign in BOUNDS.items() if name in entry]
    kind = {"string": "text", "boolean": "true, false"}.get(entry["type"], entry["type"])
    return " ".join([kind, ", ".join(bounds)]).strip()


def metrics_reference() -> str:
    """Return the tables of metrics.jsonl and of the Prometheus metrics."""
    lines = ["# Metrics reference", "", "## metrics.jsonl", ""]
    lines += ["The table is generated from `sdit/train/record.py`.", ""]
    lines += ["| name | unit | meaning |", "|---|---|---|", *record_rows()]
    lines += ["", "## Prometheus", "", "A series has the label `rank` only if the ranks differ.", ""]
    lines += ["| name | type | labels | meaning |", "|---|---|---|---|", *prometheus_rows()]
    return "\n".join(lines) + "\n"


def record_rows() -> list[str]:
    """Return a row for each metric of `StepRecord`, in the order of a line of metrics.jsonl."""
    from sdit.train.record import METRICS, StepRecord

    metadata = {field.name: field.metadata for field in dataclasses.fields(StepRecord)}
    return [f"| `{name}` | {_cell(metadata[name]['unit'])} | {_cell(metadata[name]['meaning'])} |" for name in METRICS]


def prometheus_rows() -> list[str]:
    """Return a row for each metric that the exporter serves."""
    from sdit.metrics.specs import METRICS as FAMILIES

    rows = []
    for family in FAMILIES.values():
        labels = ", ".join((*family.labels, *(("rank",) if family.by_rank else ())))
        rows.append(f"| `{family.name}` | {family.kind} | {labels} | {_cell(family.text)} |")
    return rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("[", "\\[")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].rstrip(".") + "."


def undocumented(path: Path) -> list[str]:
    """Return the public classes, functions and methods without a docstring in a file or folder, each as FILE:LINE: NAME."""
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [
        f"{file}:{line}: {name}"
        for file in files
        for line, name in _without_docstring(ast.parse(file.read_text(encoding="utf-8")), "")
    ]


def _without_docstring(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[int, str]]:
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            if ast.get_docstring(child) is None:
                yield child.lineno, f"{prefix}{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from _without_docstring(child, f"{child.name}.")


if __name__ == "__main__":
    sys.exit(main())
