"""Laws of preparation: the same bytes whatever happens on the way, and nothing done twice."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdit.data.encoders import png_encoder
from sdit.data.index import DatasetFacts, read_index
from sdit.data.pool import run_tasks
from sdit.data.prepare import prepare, verify
from sdit.data.sources import ArraySource, SourceImage
from sdit.errors import ConfigError, DataError

TOTAL, PER_SHARD = 23, 5


@dataclass(frozen=True)
class FragileSource(ArraySource):
    """Gives a fault in place of the pixels of some pictures."""

    faults: tuple[int, ...] = ()

    def subset(self, first: int, last: int) -> FragileSource:
        part = super().subset(first, last)
        return FragileSource(part.facts, part.recipe, part.pixels, part.labels, part.start, self.faults)

    def images(self) -> Iterator[SourceImage]:
        for picture in super().images():
            bad = int(picture.key) in self.faults
            yield picture._replace(pixels=DataError(f"{picture.key}.png: cannot be decoded")) if bad else picture


def source(*faults: int, version: int = 0) -> FragileSource:
    pixels = np.random.default_rng(version).integers(0, 256, (TOTAL, 1, 4, 4), dtype=np.uint8)
    facts = DatasetFacts(kind="images", total=TOTAL, channels=1, size=4, classes=10)
    return FragileSource(facts, {"version": version}, pixels, np.arange(TOTAL) % 10, 0, faults)


def run(out: Path, *faults: int, jobs: int = 1, skip_bad: bool = False, version: int = 0):  # type: ignore[no-untyped-def]
    return prepare(source(*faults, version=version), png_encoder(), out, PER_SHARD, jobs, skip_bad)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stamps(folder: Path, pattern: str = "*") -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob(pattern)}


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    """The files of a preparation that nothing disturbed."""
    run(tmp_path / "expected")
    return contents(tmp_path / "expected")


def test_a_folder_holds_index_and_shards_only(expected: dict[str, bytes]) -> None:
    assert sorted(expected) == ["index.json", *(f"shard-{number:06d}.tar" for number in range(5))]
    index = json.loads(expected["index.json"])
    assert index["facts"]["total"] == TOTAL and [shard["samples"] for shard in index["shards"]] == [5, 5, 5, 5, 3]


def test_preparing_twice_writes_nothing(tmp_path: Path) -> None:
    first = run(tmp_path / "set")
    before = stamps(tmp_path / "set")
    second = run(tmp_path / "set")
    assert (first.written, first.kept, second.written, second.kept) == (5, 0, 0, 5)
    assert stamps(tmp_path / "set") == before and first.index == second.index


def test_processes_do_not_change_a_byte(tmp_path: Path, expected: dict[str, bytes]) -> None:
    run(tmp_path / "set", jobs=2)
    assert contents(tmp_path / "set") == expected


def test_an_interrupted_preparation_goes_on_where_it_was(tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "set"
    with pytest.raises(DataError, match=r"000000012\.png: cannot be decoded"):
        run(out, 12)
    assert "index.json" not in contents(out)
    before = stamps(out, "*.tar")
    assert len(before) == 2
    assert run(out).kept == 2
    assert contents(out) == expected
    assert before.items() <= stamps(out).items()


def test_a_torn_journal_loses_one_shard_at_most(tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "set"
    with pytest.raises(DataError):
        run(out, 12)
    journal = out / "progress.jsonl"
    journal.write_bytes(journal.read_bytes()[:-10])
    with pytest.raises(DataError):
        run(out, 17)
    assert run(out).kept == 3
    assert contents(out) == expected


def test_a_journal_torn_in_its_first_line_is_begun_again(tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "set"
    out.mkdir()
    (out / "progress.jsonl").write_bytes(b'{"vers')
    assert run(out).written == 5
    assert contents(out) == expected


def test_a_leftover_of_a_killed_write_is_no_shard(tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "set"
    out.mkdir()
    (out / ".shard-000001.tar.tmp").write_bytes(b"half a shard")
    run(out)
    assert contents(out) == expected


@pytest.mark.parametrize("name", ["shard-000001.tar", "index.json"])
def test_repeating_the_command_repairs_the_folder(tmp_path: Path, expected: dict[str, bytes], name: str) -> None:
    out = tmp_path / "set"
    run(out)
    before = stamps(out, "shard-00000[0234].tar")
    (out / name).unlink()
    if name == "shard-000001.tar":
        (out / "shard-000003.tar").write_bytes(expected["shard-000003.tar"][:-1])
    run(out)
    assert contents(out) == expected
    if name == "shard-000001.tar":
        del before["shard-000003.tar"]
        assert before.items() <= stamps(out).items()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "set"
    run(out)
    before = contents(out)
    with pytest.raises(ConfigError, match=r"--out: .*set was made with version 0, this command asks for 1; choose"):
        run(out, version=1)
    assert contents(out) == before


def test_a_folder_half_made_of_something_else_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "set"
    with pytest.raises(DataError):
        run(out, 12)
    before = contents(out)
    with pytest.raises(ConfigError, match="was made with version 0"):
        run(out, version=1)
    assert contents(out) == before


def test_a_journal_that_is_no_journal_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / "set"
    out.mkdir()
    (out / "progress.jsonl").write_text("[1]\n")
    with pytest.raises(ConfigError, match=r"--out: .*progress\.jsonl cannot be read; delete it"):
        run(out)
    assert contents(out) == {"progress.jsonl": b"[1]\n"}


def test_an_index_that_is_removed_during_a_second_preparation_is_written_again(
    tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set"
    run(out)

    def removing(*arguments: Any) -> Any:
        (out / "index.json").unlink()
        return run_tasks(*arguments)

    monkeypatch.setattr("sdit.data.prepare.run_tasks", removing)
    run(out)
    assert contents(out) == expected


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "set"
    out.mkdir()
    with (out / "progress.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is being written by another process"):
            run(out)


def test_bad_images_are_left_out_if_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    done = run(tmp_path / "set", 1, 22, skip_bad=True)
    assert done.skipped == 2 and done.index.facts.total == TOTAL - 2
    assert [record.samples for record in done.index.shards] == [4, 5, 5, 5, 2]
    assert caplog.messages == [f"skipped: {number:09d}.png: cannot be decoded" for number in (1, 22)]
    assert verify(tmp_path / "set")[1] == []


def test_a_shard_of_nothing_but_bad_images_is_left_out(tmp_path: Path) -> None:
    done = run(tmp_path / "set", 20, 21, 22, skip_bad=True)
    assert done.skipped == 3 and [record.name for record in done.index.shards][-1] == "shard-000003.tar"
    assert verify(tmp_path / "set")[1] == []


def test_a_class_of_nothing_but_bad_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--skip-bad leaves classes without images: label 9; --allow-empty-classes"):
        run(tmp_path / "set", 9, 19, skip_bad=True)


def test_verify_names_every_fault(tmp_path: Path) -> None:
    out = tmp_path / "set"
    run(out)
    assert verify(out)[1] == []
    (out / "shard-000000.tar").unlink()
    data = (out / "shard-000003.tar").read_bytes()
    (out / "shard-000003.tar").write_bytes(data[:600] + b"!" + data[601:])
    problems = verify(out)[1]
    assert [problem.split(":")[0] for problem in problems] == ["shard-000000.tar", "shard-000003.tar"]


def test_an_index_comes_last(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        run(tmp_path / "set", 22)
    assert len(list((tmp_path / "set").glob("*.tar"))) == 4
    with pytest.raises(DataError, match="its preparation did not finish"):
        read_index(tmp_path / "set")
