"""README and documentation: commands and links name what exists, and the generated references are complete."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdit.config import config_keys
from sdit.train.record import METRICS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"))
MAX_README_WORDS = 1400


def commands(page: Path) -> Iterator[str]:
    """Yield the lines of code blocks without a language, and the code inside sentences and tables."""
    text = page.read_text()
    for block in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from (line for line in block.splitlines() if not line.startswith("error: "))
    yield from re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def words_of(page: Path, pattern: str) -> set[str]:
    return {word for command in commands(page) for word in re.findall(pattern, command)}


def test_readme_is_short() -> None:
    assert len(README.split()) <= MAX_README_WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_files_that_exist(page: Path) -> None:
    named = words_of(page, r"(?<![\w/.])((?:launcher|cluster|configs|docker|benchmarks|experiments|tests)/[\w./-]*\w)")
    named = {path for path in named if "/test_" not in path or path.endswith(".py")}  # see the test of the fault table
    not_files = {"launcher/COMMAND.py", "docker/wheels", "cluster/env.sh"}  # the reader makes the last two
    assert [path for path in sorted(named - not_files) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_targets_presets_and_subcommands_that_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    presets = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    subcommands = {path.stem for path in (ROOT / "launcher").glob("[!_]*.py")} | {"config"}
    assert words_of(page, r"^make ([a-z-]+)") <= targets
    assert words_of(page, r"--config (\w+)(?: |$)") <= presets
    assert words_of(page, r"(?:^|&& )sdit ([a-z]+)(?: |$)") <= subcommands


def test_readme_names_seven_files_to_read_that_exist() -> None:
    listed = re.findall(r"^\d\. `([^`]+)`", README[README.index("## Reading order") :], re.MULTILINE)
    assert len(listed) == 7
    assert [path for path in listed if not (ROOT / path).is_file()] == []


def test_links_of_the_readme_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    for path, _, anchor in (link.partition("#") for link in links):
        assert (ROOT / path).exists(), path
        headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}


def test_every_test_that_the_page_of_faults_names_exists() -> None:
    tests = ROOT / "tests"
    files = {str(path.relative_to(tests).with_suffix("")) for path in tests.rglob("test_*.py")}
    functions = {name for path in tests.rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    known = files | {path.removeprefix("faults/") for path in files} | functions
    named = words_of(ROOT / "docs" / "faults.md", r"(?:tests/)?((?:\w+/)*test_\w+)")
    assert named
    assert [name for name in sorted(named) if not any(each.startswith(name) for each in known)] == []


def test_config_reference_has_every_key() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \|", GENERATE["config_reference"](), re.MULTILINE)
    assert sorted(rows) == sorted(key for key, _, _ in config_keys())


def test_every_config_key_says_its_effect() -> None:
    assert [key for key, info, _ in config_keys() if not info.description] == []


def test_metrics_reference_has_every_metric_with_a_unit_and_a_meaning() -> None:
    rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in GENERATE["record_rows"]()]
    assert [row[0].strip("` ") for row in rows] == list(METRICS)
    assert all(unit and meaning for _, unit, meaning in rows)


def test_undocumented_names_are_found(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        'class Known:\n    """Text."""\n    def method(self): ...\n    def _private(self): ...\n\ndef function(): ...\n'
    )
    found = [line.rpartition(" ")[2] for line in GENERATE["undocumented"](tmp_path)]
    assert found == ["Known.method", "function"]


def test_python_api_has_no_undocumented_name() -> None:
    assert [line for path in GENERATE["DOCUMENTED"] for line in GENERATE["undocumented"](path)] == []


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    """A broken link between pages, a missing image and a page outside the contents are warnings."""
    assert GENERATE["main"]() == 0
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-b", "dummy", "docs", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
