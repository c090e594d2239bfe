"""The records of a tar file that others wrote for webdataset: an image member and a label member with the same key."""

from __future__ import annotations

import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sdit.data.decode import IMAGE_FORMATS
from sdit.data.names import shown
from sdit.data.record_labels import as_label, label_column, odd_labels
from sdit.data.records import RECORD, Listing, Named
from sdit.data.shards import MAX_MEMBER_BYTES
from sdit.data.tar_headers import BLOCK, read_member
from sdit.errors import DataError

LabelMember = Literal["cls", "json", "txt"]
LABEL_MEMBERS: tuple[LabelMember, ...] = ("cls", "json", "txt")
MAX_LABEL_BYTES = 2**20
# On hostile bytes.
TAR_ERRORS = (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError, TypeError)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")


@dataclass(frozen=True)
class TarLabels:
    """The `member` that holds the label, None: the first of LABEL_MEMBERS that the archive has. `key`: of a json member."""

    member: LabelMember | None = None
    key: str = "label"
    unlabelled: bool = False


BY_DEFAULT = TarLabels()


@dataclass
class _Found:
    """The members of one key: the image, and the texts of the label members by suffix."""

    row: int
    image: tuple[int, int] | None  # offset and size in the archive
    texts: dict[str, bytes]
    fault: str = ""


@dataclass(frozen=True)
class TarArchive:
    """A tar file. The key of a member is its name up to its last dot. If it is compressed, it is read from the start."""

    path: Path
    labels: TarLabels = BY_DEFAULT

    def list_records(self) -> Listing:
        with _open_tar(self.path) as tar:
            found, cut = _members(tar, self.path)
        keys = _record_keys(found)
        member = self._label_member(found, keys)
        table = np.zeros(len(keys) + bool(cut), RECORD)
        faults: dict[int, str] = {}
        labels: list[int | str | None] = []
        for position, key in enumerate(keys):
            each = found[key]
            label, fault = self._label(each, member)
            if fault := each.fault or fault:
                faults[each.row] = f"sample {shown(key)}: {fault}"
            labels.append(label)
            offset, size = each.image or (0, 0)
            table[position] = (0, each.row, offset, size, 0, 0)
        for position, reason in odd_labels(labels).items():
            faults.setdefault(found[keys[position]].row, f"sample {shown(keys[position])}: {reason}")
        if cut:
            faults[-1] = cut
            table[-1]["row"] = -1
            labels.append(None)
        return Listing(table, label_column(labels, self.path, has_labels=not self.labels.unlabelled), faults)

    def _label_member(self, found: dict[str, _Found], keys: list[str]) -> str | None:
        if self.labels.unlabelled or self.labels.member is not None:
            return self.labels.member
        present = {suffix for key in keys for suffix in found[key].texts}
        return next((suffix for suffix in LABEL_MEMBERS if suffix in present), None)

    def _label(self, found: _Found, member: str | None) -> tuple[int | str | None, str]:
        """Return the label of a record, and the reason if the record cannot be used."""
        if found.image is None:
            return None, f"has no image; legal: {', '.join(IMAGE_FORMATS)}"
        if self.labels.unlabelled:
            return 0, ""
        if member is None or member not in found.texts:
            return None, f"has no label; legal: a member {member or ' or '.join(LABEL_MEMBERS)}"
        text = found.texts[member]
        try:
            value: Any = text.decode("utf-8").strip()
            if member == "json":
                value = _at(json.loads(text), self.labels.key)
        except (ValueError, KeyError, TypeError, RecursionError):
            wanted = f"JSON with the key {self.labels.key!r}" if member == "json" else "UTF-8 text"
            return None, f"has a member {member} that is not {wanted}"
        label = as_label(value)
        return label, "" if label is not None else f"has the label {shown(repr(value)[:40])}; legal: a number or a text"

    def read(self, records: np.ndarray) -> Iterator[Named]:
        if is_compressed(self.path):
            yield from self._read_stream(records)
            return
        with self.path.open("rb") as file:
            for record in records:
                size = int(record["size"])
                member, data = read_member(file.fileno(), int(record["offset"]), size)
                name = f"{self.path}: {member}"
                yield name, data if len(data) == size else DataError(f"{shown(name)}: is cut off")

    def _read_stream(self, records: np.ndarray) -> Iterator[Named]:
        """Read a compressed archive from its start up to the last of the records."""
        wanted = {int(record["offset"]): number for number, record in enumerate(records)}
        found: dict[int, Named] = {}
        due = 0
        with _open_tar(self.path) as tar, suppress(*TAR_ERRORS):
            for member in _walk(tar):
                number = wanted.get(member.offset_data)
                if number is not None:
                    found[number] = (f"{self.path}: {member.name}", _content(tar, member))
                while due in found:
                    yield found.pop(due)
                    due += 1
                if due == len(records):
                    return
        for _ in range(due, len(records)):
            yield str(self.path), DataError(f"{shown(self.path)}: changed since it was listed")


def _at(value: Any, key: str) -> Any:
    """Return the value of a dotted key of nested JSON objects."""
    for name in key.split("."):
        value = value[name]
    return value


@lru_cache(maxsize=16)
def is_compressed(path: Path) -> bool:
    """Return True if the file begins like gzip, bzip2 or xz."""
    with path.open("rb") as file:
        return file.read(6).startswith(_COMPRESSED)


def _open_tar(path: Path) -> tarfile.TarFile:
    """Open a tar file, compressed or not.

    Raises: DataError: if it is not a tar file.
    """
    try:
        if not path.is_file():
            raise DataError(f"{shown(path)}: no such file; legal: a tar file")
        return tarfile.open(path, "r|*" if is_compressed(path) else "r:")
    except TAR_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{shown(path)}: cannot be opened: {error.strerror}") from None
        raise DataError(f"{shown(path)}: cannot be read as a tar file: {error}") from None


def _walk(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members. Only one is in memory at a time."""
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them
        yield member


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | DataError:
    file = tar.extractfile(member)
    try:
        data = b"" if file is None else file.read()
    except TAR_ERRORS as error:
        return DataError(f"{shown(member.name)}: cannot be unpacked: {error}")
    return data if len(data) == member.size else DataError(f"{shown(member.name)}: is cut off")


def _members(tar: tarfile.TarFile, path: Path) -> tuple[dict[str, _Found], str]:
    """Return the members by key in their order, and why the archive ends early."""
    found: dict[str, _Found] = {}
    try:
        for member in _walk(tar):
            folder, _, base = member.name.rpartition("/")
            stem, dot, suffix = base.rpartition(".")
            suffix = suffix.lower()
            if member.isdir() or base.startswith(".") or not dot or suffix not in (*IMAGE_FORMATS, *LABEL_MEMBERS):
                continue
            each = found.setdefault(f"{folder}/{stem}" if folder else stem, _Found(len(found), None, {}))
            each.fault = each.fault or _add(tar, member, suffix, each)
    except TAR_ERRORS as error:
        return found, f"cannot be read after {len(found)} samples: {str(error) or type(error).__name__}"
    rest = 0 if is_compressed(path) else path.stat().st_size - tar.offset  # type: ignore[attr-defined]
    return found, f"cannot be read after {len(found)} samples: is cut off" if 0 < rest < BLOCK else ""


def _add(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, found: _Found) -> str:
    """Add a member to its record. Return the reason if the record cannot be used."""
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        return f"has a member {suffix} that is not a plain file"
    if suffix in IMAGE_FORMATS:
        if found.image is not None:
            return "has two images"
        found.image = (member.offset_data, member.size)
        return f"has {member.size} bytes; legal: up to {MAX_MEMBER_BYTES}" if member.size > MAX_MEMBER_BYTES else ""
    if suffix in found.texts:
        return f"has two members {suffix}"
    if member.size > MAX_LABEL_BYTES:
        return f"has a member {suffix} of {member.size} bytes; legal: up to {MAX_LABEL_BYTES}"
    content = _content(tar, member)
    found.texts[suffix] = b"" if isinstance(content, DataError) else content
    return str(content) if isinstance(content, DataError) else ""


def _record_keys(found: dict[str, _Found]) -> list[str]:
    """Return the keys that are records of their own.

    A key without an image or without a label belongs to another key that is its beginning up to a dot: 000.seg.png and
    000.meta.json belong to 000.
    """

    def is_extra(key: str, each: _Found) -> bool:
        if each.image is not None and each.texts:
            return False
        folder, slash, base = key.rpartition("/")
        parts = base.split(".")
        return any(f"{folder}{slash}{'.'.join(parts[:count])}" in found for count in range(1, len(parts)))

    return [key for key, each in found.items() if not is_extra(key, each)]
