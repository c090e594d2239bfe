"""A folder that is written atomically."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdit.files import new_folder, remove_folder


def test_a_filled_folder_appears_whole(tmp_path: Path) -> None:
    for name in ("new", "empty"):
        path = tmp_path / name
        if name == "empty":
            path.mkdir()
        with new_folder(path) as partial:
            (partial / "a").write_text("1")
            assert not (path / "a").exists()
        assert (path / "a").read_text() == "1"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["empty", "new"]


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        raise RuntimeError
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_exists_is_not_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    if kind == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "a").write_text("mine")
    with pytest.raises(FileExistsError, match="already exists; legal: a new or an empty folder"), new_folder(path):
        raise AssertionError("the block must not run")
    assert (path if kind == "file" else path / "a").read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_many_files_is_removed_with_its_subfolders_but_not_what_its_links_name(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    for name in [*(f"{number}" for number in range(100)), "sub/file"]:
        (folder / name).touch()
    (outside / "file").touch()
    (folder / "link").symlink_to(outside)
    remove_folder(folder)
    assert not folder.exists() and (outside / "file").exists()
    remove_folder(folder)
