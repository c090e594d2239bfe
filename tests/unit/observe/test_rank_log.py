"""Every rank keeps its log; what is secret stays out of it."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest

from sdit.launch_environment import RankInfo
from sdit.observe.rank_log import RankLog
from sdit.redact import redact
from sdit.supervise.log_files import append_to, log_path, mark_lines


def info(rank: int) -> RankInfo:
    return RankInfo(rank=rank, world=4, local_rank=rank, local_world=4, source="test")


def test_each_rank_writes_its_own_file_and_says_who_it_is_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (0, 3):
        log = RankLog(tmp_path, info(rank))
        logging.getLogger("sdit.data.bad_samples").warning("shard %d is torn", rank)
        logging.getLogger("sdit.data.bad_samples").info("only for the file")
        log.close()
        logging.getLogger("sdit.data.bad_samples").warning("after its end")
    assert capsys.readouterr().err.splitlines() == ["shard 0 is torn", "rank 3: shard 3 is torn"]
    lines = log_path(tmp_path / "logs", 3, "log").read_text().splitlines()
    pattern = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ rank 3 (INFO|WARNING) sdit\.[\w.]+: .*"
    assert all(re.fullmatch(pattern, line) for line in lines)
    assert [line.split(": ", 1)[1] for line in lines[1:]] == ["shard 3 is torn", "only for the file"]


def test_a_library_with_a_terminal_of_its_own_is_heard_in_the_file(tmp_path: Path) -> None:
    library = logging.getLogger("a_library")
    library.propagate = False
    log = RankLog(tmp_path, info(0))
    library.warning("its own words")
    log.close()
    library.warning("too late")
    assert "its own words" in (tmp_path / "logs" / "rank-000.log").read_text()
    assert not library.handlers


def test_a_rank_that_fails_leaves_its_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RankLog(tmp_path, info(1))
    with pytest.raises(ZeroDivisionError):
        try:
            1 / 0  # noqa: B018
        finally:
            log.close()
    lines = log_path(tmp_path / "logs", 1, "log").read_text().splitlines()
    assert any("rank 1 ERROR" in line for line in lines)
    assert any(line.startswith("rank 1 | ZeroDivisionError") for line in lines)
    assert all(line.startswith("rank 1 | ") or " rank 1 " in line for line in lines)
    assert "Traceback" not in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_costs_the_log_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    log = RankLog(tmp_path, info(0))
    logging.getLogger("sdit").warning("still printed")
    log.close()
    assert "writes no log" in (said := capsys.readouterr().err) and "still printed" in said


def test_a_full_disk_costs_lines_of_the_log_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-000.log").symlink_to("/dev/full")
    log = RankLog(tmp_path, info(0))
    logging.getLogger("sdit").info("no room")
    log.close()
    assert capsys.readouterr().err.count("No space left on device; lines are lost") == 1


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("HF_TOKEN=hf_abc in the command", "HF_TOKEN=(hidden) in the command"),
        ("wandb_api_key = 123abc, next", "wandb_api_key = (hidden), next"),
        ("push to https://me:pass1@host:9091/x", "push to https://(hidden)@host:9091/x"),
        ("the session is s3cr3t-v4lue.", "the session is (hidden)."),
        ("optimizer.learning_rate=1e-4 tokens=12", "optimizer.learning_rate=1e-4 tokens=12"),
        ("shard-0.tar: key 000123: no image", "shard-0.tar: key 000123: no image"),
    ],
)
def test_secrets_are_hidden_and_nothing_else(text: str, kept: str) -> None:
    assert redact(text, {"MY_SECRET": "s3cr3t-v4lue", "SHORT_KEY": "1", "HOME": "/root"}) == kept


def test_ranks_of_a_node_share_a_log_and_rank_0_has_its_own(tmp_path: Path) -> None:
    logs = [RankLog(tmp_path, info(rank)) for rank in range(3)]
    for rank, log in enumerate(logs):
        logging.getLogger("sdit").warning("from %d", rank)
        log.close()
    names = {path.name for path in (tmp_path / "logs").iterdir()}
    node = log_path(tmp_path, 1, "log").name
    assert names == {"rank-000.log", node} and log_path(tmp_path, 2, "log").name == node
    shared = log_path(tmp_path / "logs", 1, "log").read_text()
    assert (
        " rank 1 WARNING sdit: from 1\n" in shared
        and " rank 2 WARNING sdit: from 2\n" in shared
        and "rank 0 " not in shared
    )


def test_lines_of_many_processes_are_never_mixed(tmp_path: Path) -> None:
    path, count = tmp_path / "node.stacks", 100
    text = "".join(f"line {number} {'x' * 300}\n" for number in range(20))
    children = []
    for rank in range(1, 5):
        child = os.fork()
        if child == 0:
            for _ in range(count):
                append_to(path, mark_lines(text, rank))
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    blocks = path.read_text().split("line 0 ")
    lines = path.read_text().splitlines()
    assert len(lines) == 4 * count * 20 and len(blocks) == 4 * count + 1
    for start in range(0, len(lines), 20):
        rank = lines[start].partition(" | ")[0]
        assert lines[start : start + 20] == [f"{rank} | {line}" for line in text.splitlines()]
