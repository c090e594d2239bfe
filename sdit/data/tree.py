"""A folder tree of images with one subfolder per class: its images, and the files that are left out."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sdit.data.image_file import FILE_FORMATS
from sdit.data.names import shown, stored_name
from sdit.errors import ConfigError, DataError
from sdit.files import naming

IGNORED_FOLDERS = frozenset(
    {"__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
)
SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval")  # the most likely first
SHOWN = 10  # names in a list


@dataclass
class LeftOut:
    """Paths under the root that are not read: files by suffix, and the others by reason."""

    endings: dict[str, list[str]] = field(default_factory=dict)
    hidden_files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    outside_classes: list[str] = field(default_factory=list)
    empty_classes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return one line for each reason."""
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
    """The sorted image paths of each class under `root`, in the order of the labels. Without classes, `images` holds them.

    `folders_only`: the classes whose images are all in subfolders of the class folder, which holds no files itself.
    """

    root: Path
    classes: dict[str, list[str]]
    images: list[str]
    folders_only: frozenset[str]
    left_out: LeftOut

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names as UTF-8 text. Bytes that are not UTF-8 are escaped."""
        return tuple(map(stored_name, self.classes))

    def labelled(self) -> list[tuple[str, int]]:
        """Return all image paths with their labels. The label is 0 if there are no classes."""
        if not self.classes:
            return [(name, 0) for name in self.images]
        return [(name, label) for label, names in enumerate(self.classes.values()) for name in names]

    def mapping(self) -> list[str]:
        """Return one line for each label. If there are many, return only the first and last ones."""
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
    """List a tree. Labels number the subfolders, sorted as text or, if `numeric`, by number. The folder `out` is left out.

    Raises:
        DataError: if a folder is missing or cannot be read, or two classes have the same name.
        ConfigError: if `numeric` is True and a class name is not a number.
        OSError: if the file system fails.
    """
    walk = _Walk(root, None if out is None else os.path.realpath(out))
    folders, files = walk.sorted_entries("")
    _refuse_broken_links(root, files)
    classes = {name: walk.images(name) for name in _in_label_order(folders, numeric)}
    folders_only = frozenset(name for name, names in classes.items() if names and name not in walk.folders_with_files)
    images = walk.images_among(files)
    if classes:
        walk.left_out.outside_classes += images
        walk.left_out.empty_classes += [name for name, names in classes.items() if not names]
    tree = ImageTree(root, classes, [] if classes else images, folders_only, walk.left_out)
    twice = [name for name, count in Counter(tree.class_names).items() if count > 1]
    if twice:
        raise DataError(f"{shown(root)}: two class folders are both stored as {shown(twice[0])!r}; rename one of them")
    return tree


def refuse_splits(tree: ImageTree) -> None:
    """Check that the subfolders are classes, not splits such as train and val.

    Raises: DataError: if they look like splits. The message names the folder that is probably meant.
    """
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
    """Check that each class has images.

    Raises: DataError: if a class has none.
    """
    empty = tree.left_out.empty_classes
    if empty:
        raise DataError(
            f"{shown(tree.root)}: {len(empty)} classes without images: {listed(empty)}; remove their folders, or give "
            f"--allow-empty-classes to keep their labels; read endings: {', '.join(FILE_FORMATS)}"
        )


def listed(names: list[str], most: int = SHOWN) -> str:
    """Return the names in one line. If there are more than `most`, return the first ones and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def _likely_folder(tree: ImageTree) -> Path:
    """Return the folder that holds the class folders: the training split, or the one with the most images."""

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
    """Reads the folders of one tree and records in `left_out` the files that are not images.

    Paths are relative to the root, which is the empty path.
    """

    def __init__(self, root: Path, out: str | None) -> None:
        self._root, self._out = root, out
        self.left_out = LeftOut()
        self.folders_with_files: set[str] = set()

    def sorted_entries(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the subfolders and the files of a folder, sorted, without hidden and ignored entries."""
        folders, files = [], []
        for name, is_folder in _entries(self._root / folder):
            path = f"{folder}/{name}" if folder else name
            if is_folder and (name.startswith(".") or name in IGNORED_FOLDERS or self._is_out(path)):
                self.left_out.folders.append(path)
            elif is_folder:
                folders.append(path)
            elif name.startswith("."):
                self.left_out.hidden_files.append(path)
            else:
                files.append(path)
        if files:
            self.folders_with_files.add(folder)
        return sorted(folders), sorted(files)

    def _is_out(self, path: str) -> bool:
        return self._out is not None and os.path.realpath(self._root / path) == self._out

    def images(self, folder: str) -> list[str]:
        """Return the sorted images of a folder and its subfolders. A link to one of its own parent folders is not followed."""
        found: list[str] = []
        waiting: list[tuple[str, tuple[str, ...]]] = [(folder, (os.path.realpath(self._root),))]
        while waiting:
            path, parents = waiting.pop()
            real = os.path.realpath(self._root / path)
            if any(parent == real or parent.startswith(real.rstrip("/") + "/") for parent in parents):
                self.left_out.folders.append(path)
                continue
            folders, files = self.sorted_entries(path)
            found += self.images_among(files)
            waiting += [(each, (*parents, real)) for each in folders]
        return sorted(found)

    def images_among(self, files: list[str]) -> list[str]:
        """Return the files with the suffix of an image format."""
        images = []
        for path in files:
            if _has_image_ending(path):
                images.append(path)
            else:
                self.left_out.endings.setdefault(os.path.splitext(path)[1].lower(), []).append(path)
        return images


def _entries(folder: Path) -> Iterator[tuple[str, bool]]:
    """Yield the name of each entry, and True if it is a folder or a link to one.

    Raises:
        DataError: if the folder is missing or cannot be read. The message names it.
        OSError: if the file system fails.
    """
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
    except OSError as error:  # a link whose target cannot be reached
        if error.errno == errno.ELOOP or _has_image_ending(entry.name):
            return False
        raise


def _has_image_ending(name: str) -> bool:
    return os.path.splitext(name)[1].lower()[1:] in FILE_FORMATS


def _refuse_broken_links(root: Path, files: list[str]) -> None:
    """Check the links next to the class folders.

    Raises: DataError: if a link is broken, because it may have been a class.
    """
    for name in files:
        if not _has_image_ending(name) and os.path.islink(root / name) and not os.path.exists(root / name):
            raise DataError(
                f"{shown(root / name)}: a broken symbolic link next to the class folders; repair or remove it"
            )
