"""A tree of images, one subfolder for each class: what is read from it, and all that is left out."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sdit.data.names import shown, stored_name
from sdit.data.picture import FILE_FORMATS
from sdit.errors import ConfigError, DataError
from sdit.files import naming

IGNORED_FOLDERS = frozenset(
    {"__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
)
SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval")  # likeliest first
SHOWN = 10  # names in a list


@dataclass
class LeftOut:
    """What is not read, as paths under the root: files by ending, and the rest by reason."""

    endings: dict[str, list[str]] = field(default_factory=dict)
    hidden_files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    outside_classes: list[str] = field(default_factory=list)
    empty_classes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """One line for each reason."""
        files = sum(map(len, self.endings.values()))
        endings = sorted(self.endings.items(), key=lambda item: (-len(item[1]), item[0]))
        by_ending = ", ".join(
            f"{len(names)} {shown(ending) or 'without an ending'} ({listed(names, 1)})" for ending, names in endings
        )
        reasons = [
            ("files that are no images", files, by_ending),
            ("hidden files", len(self.hidden_files), listed(self.hidden_files)),
            ("folders", len(self.folders), listed(self.folders, len(self.folders))),
            ("images next to the class folders", len(self.outside_classes), listed(self.outside_classes)),
            ("classes without images", len(self.empty_classes), listed(self.empty_classes, len(self.empty_classes))),
        ]
        return [f"left out: {reason}: {count}: {names}" for reason, count, names in reasons if count]


@dataclass(frozen=True)
class ImageTree:
    """Sorted image paths under `root` of each class, in the order of their labels; `images` where there are no classes.

    `folders_only`: the classes whose images are all in folders of the class folder, which holds no file itself.
    """

    root: Path
    classes: dict[str, list[str]]
    images: list[str]
    folders_only: frozenset[str]
    left_out: LeftOut

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names as they are stored: text, for any bytes of the file system."""
        return tuple(map(stored_name, self.classes))

    def labelled(self) -> list[tuple[str, int]]:
        """All image paths with their labels; 0 where there are no classes."""
        if not self.classes:
            return [(name, 0) for name in self.images]
        return [(name, label) for label, names in enumerate(self.classes.values()) for name in names]

    def mapping(self) -> list[str]:
        """One line for each label, or the first and last of many."""
        lines = [
            f"label {label}: {shown(name)}, {len(names)} images"
            for label, (name, names) in enumerate(self.classes.items())
        ]
        if len(lines) > 5 * SHOWN:
            lines[SHOWN:-SHOWN] = [f"... {len(lines) - 2 * SHOWN} more; index.json holds all names"]
        names = list(self.classes)
        if all(map(_is_number, names)) and names != sorted(names, key=int):
            lines.append("class folders are sorted as text; --numeric-classes sorts them by number")
        return lines


def read_tree(root: Path, out: Path | None = None, numeric: bool = False) -> ImageTree:
    """List a tree; labels number the subfolders, sorted as text or, if `numeric`, by number. `out` is left out.

    Raises:
        DataError: a folder is missing or cannot be read, or two classes have one name.
        ConfigError: `numeric`, and a class is no number.
        OSError: the file system failed.
    """
    left_out = LeftOut()
    walk = _Walk(root, None if out is None else os.path.realpath(out), left_out)
    folders, files = walk.sorted_entries("")
    _refuse_broken_links(root, files)
    classes: dict[str, list[str]] = {}
    for name in _in_label_order(folders, numeric):
        classes[name] = walk.images(name)
    folders_only = frozenset(name for name, names in classes.items() if names and name not in walk.folders_with_files)
    images = walk.images_among(files)
    if classes:
        left_out.outside_classes += images
        left_out.empty_classes += [name for name, names in classes.items() if not names]
    tree = ImageTree(root, classes, [] if classes else images, folders_only, left_out)
    twice = [name for name, count in Counter(tree.class_names).items() if count > 1]
    if twice:
        raise DataError(f"{shown(root)}: two class folders are both stored as {shown(twice[0])!r}; rename one of them")
    return tree


def refuse_splits(tree: ImageTree) -> None:
    """DataError if the subfolders look like splits (train, val), not like classes; it names the likely folder."""
    filled = [name for name, names in tree.classes.items() if names]
    splits = len(filled) > 1 and all(name.lower() in SPLITS for name in filled)
    folders_only = bool(filled) and tree.folders_only.issuperset(filled)
    if not (splits or folders_only):
        return
    raise DataError(
        f"{shown(tree.root)}: its subfolders ({listed(filled)}) look like splits, not like classes: "
        f"{'they hold only folders' if folders_only else 'their names say so'}; "
        f"likely: --images {shown(_likely_folder(tree))}; if they are the classes: --nested-classes"
    )


def refuse_empty_classes(tree: ImageTree) -> None:
    """DataError if a class has no images."""
    empty = tree.left_out.empty_classes
    if empty:
        raise DataError(
            f"{shown(tree.root)}: {len(empty)} classes without images: {listed(empty)}; remove their folders, or give "
            f"--allow-empty-classes to keep their labels; read endings: {', '.join(FILE_FORMATS)}"
        )


def listed(names: list[str], most: int = SHOWN) -> str:
    """The names, or the first of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def _likely_folder(tree: ImageTree) -> Path:
    """The folder that holds the class folders: the training split, or else the one with most images."""

    def likelihood(name: str) -> tuple[int, int]:
        rank = SPLITS.index(name.lower()) if name.lower() in SPLITS else len(SPLITS)
        return -rank, len(tree.classes[name])

    filled = [name for name, names in tree.classes.items() if names]
    best = read_tree(tree.root / max(filled, key=likelihood))
    nested = best.folders_only and best.folders_only.issuperset(name for name, names in best.classes.items() if names)
    return _likely_folder(best) if nested else best.root


def _in_label_order(names: list[str], numeric: bool) -> list[str]:
    if not numeric:
        return names
    other = [name for name in names if not _is_number(name)]
    if other:
        raise ConfigError(f"--numeric-classes: class folder {shown(other[0])!r}; legal: whole numbers")
    return sorted(names, key=int)


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


class _Walk:
    """Reads folders of one tree and notes in `left_out` what is no image. Paths are relative to the root; "" is it."""

    def __init__(self, root: Path, out: str | None, left_out: LeftOut) -> None:
        self._root = root
        self._out = out
        self._left_out = left_out
        self.folders_with_files: set[str] = set()

    def sorted_entries(self, folder: str) -> tuple[list[str], list[str]]:
        """Subfolders and other entries that are not hidden or ignored."""
        folders, files = [], []
        for name, is_folder in _entries(self._root / folder):
            path = f"{folder}/{name}" if folder else name
            if is_folder and (name.startswith(".") or name in IGNORED_FOLDERS or self._is_out(path)):
                self._left_out.folders.append(path)
            elif is_folder:
                folders.append(path)
            elif name.startswith("."):
                self._left_out.hidden_files.append(path)
            else:
                files.append(path)
        if files:
            self.folders_with_files.add(folder)
        return sorted(folders), sorted(files)

    def _is_out(self, path: str) -> bool:
        return self._out is not None and os.path.realpath(self._root / path) == self._out

    def images(self, folder: str) -> list[str]:
        """Sorted images of a folder and its subfolders. Linked folders are followed, but not into their own parents."""
        found: list[str] = []
        waiting: list[tuple[str, tuple[str, ...]]] = [(folder, (os.path.realpath(self._root),))]
        while waiting:
            path, parents = waiting.pop()
            real = os.path.realpath(self._root / path)
            if any(parent == real or parent.startswith(real.rstrip("/") + "/") for parent in parents):
                self._left_out.folders.append(path)
                continue
            folders, files = self.sorted_entries(path)
            found += self.images_among(files)
            waiting += [(each, (*parents, real)) for each in folders]
        return sorted(found)

    def images_among(self, files: list[str]) -> list[str]:
        """The files with an image's ending."""
        images = []
        for path in files:
            if _has_image_ending(path):
                images.append(path)
            else:
                ending = os.path.splitext(path)[1].lower()
                self._left_out.endings.setdefault(ending, []).append(path)
        return images


def _entries(folder: Path) -> Iterator[tuple[str, bool]]:
    """Name of each entry, and whether it is a folder or a link to one. Errors name the folder."""
    try:
        with naming(folder), os.scandir(folder) as entries:
            found = [(entry.name, _is_folder(entry)) for entry in entries]
        if not os.access(folder, os.X_OK):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
    except FileNotFoundError:
        raise DataError(
            f"{shown(folder)}: no such folder; legal: a folder with one subfolder of images for each class"
        ) from None
    except (PermissionError, NotADirectoryError) as error:
        raise DataError(f"{shown(error.filename)}: this folder cannot be read: {error.strerror}") from None
    yield from found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # of a link whose target cannot be reached
        if error.errno == errno.ELOOP or _has_image_ending(entry.name):
            return False
        raise


def _has_image_ending(name: str) -> bool:
    return os.path.splitext(name)[1].lower()[1:] in FILE_FORMATS


def _refuse_broken_links(root: Path, files: list[str]) -> None:
    """DataError if a link next to the class folders leads nowhere: it may have been a class."""
    for name in files:
        if not _has_image_ending(name) and os.path.islink(root / name) and not os.path.exists(root / name):
            raise DataError(
                f"{shown(root / name)}: a broken symbolic link next to the class folders; mend or remove it"
            )
