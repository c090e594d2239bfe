"""Each figure of a hardware preset names its source and the kind of it, in `sources` and in the comment of its line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from sdit.cli.presets import HARDWARE, presets
from sdit.planner.hardware import read_hardware

KINDS = {"primary", "secondary", "unchecked", "measured", "assumed"}
SOURCE = re.compile(r"(\w+) \[([^]]+)\]: .{5,}", re.DOTALL)
PRESETS = presets(HARDWARE)


def figures(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the numbers of a hardware file. The utilizations by width are one figure."""
    for key, value in values.items():
        if isinstance(value, dict) and key != "mfu":
            yield from figures(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float, dict)):
            yield f"{prefix}{key}"


def kinds_of(path: Path) -> dict[str, set[str]]:
    """Return the kinds of the sources of each figure."""
    hardware = read_hardware(path)
    found: dict[str, set[str]] = {name: set() for name in figures(hardware.model_dump())}
    for source in hardware.sources:
        match = SOURCE.fullmatch(source)
        assert match and match[1] in KINDS, source
        for pattern in re.split(r",\s+", match[2]):
            names = [name for name in found if fnmatchcase(name, pattern)]
            assert names, f"{path.name}: {pattern} is no figure"
            for name in names:
                found[name].add(match[1])
    return found


def lines_of(path: Path) -> Iterator[tuple[list[str], str]]:
    """Yield the figures and the comment of each line with figures."""
    section = "device."
    for line in path.read_text().partition("\ndevice:\n")[2].splitlines():
        text, _, comment = line.partition("  # ")
        key, _, value = text.strip().partition(":")
        if not line.startswith(" "):
            section = f"{key}." if not value else ""
        inner = re.findall(r"([a-z_]+): ", value)
        if re.search(r"\d", value):
            yield [f"{section}{key}.{name}" for name in inner] or [f"{section}{key}"], comment


@pytest.mark.parametrize("name", PRESETS)
def test_each_figure_has_a_source_and_its_kind(name: str) -> None:
    without = [figure for figure, kinds in kinds_of(Path(PRESETS[name])).items() if not kinds]
    assert not without, f"{name}: figures without a source: {without}"


@pytest.mark.parametrize("name", PRESETS)
def test_the_line_of_each_figure_says_the_kinds_of_its_sources(name: str) -> None:
    kinds, seen = kinds_of(Path(PRESETS[name])), set()
    for line_figures, comment in lines_of(Path(PRESETS[name])):
        assert set(re.findall(r"\w+", comment)) & KINDS == set().union(*(kinds[each] for each in line_figures)), comment
        seen.update(line_figures)
    assert seen == kinds.keys()


def test_only_a_maker_s_own_figures_count_as_primary() -> None:
    """The figures of these GPUs that no source here confirms are named as such."""
    unchecked = {
        name: [f for f, kinds in kinds_of(Path(path)).items() if "unchecked" in kinds] for name, path in PRESETS.items()
    }
    assert unchecked == {
        "a100-ib": ["device.fp32_teraflops", "device.host_copy_gigabytes_per_second"],
        "h100-ib": [],
        "h200-ib": ["device.memory_gigabytes_per_second"],
    }
