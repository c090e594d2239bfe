"""One tar shard: written durably with webdataset, then read whole, verified, and parsed in memory."""

from __future__ import annotations

import hashlib
import io
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from webdataset.tariterators import group_by_keys  # type: ignore[import-untyped]
from webdataset.writer import TarWriter  # type: ignore[import-untyped]

from sdit.checked_files import NotRegularFile, read_regular
from sdit.data.decode import ALLOWED_SUFFIXES, Sample, decode_sample
from sdit.data.faults import BadShard
from sdit.data.index import DatasetFacts, ShardRecord
from sdit.files import replacing

MAX_MEMBER_BYTES = 64 * 2**20
READ_ATTEMPTS = 3
Encoded = Mapping[str, bytes]


class TarShard:
    """The encoded samples of one verified shard, in memory."""

    def __init__(self, name: str, samples: list[dict[str, bytes]], keys: list[str], facts: DatasetFacts) -> None:
        self.name = name
        self._samples = samples
        self._keys = keys
        self._facts = facts

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, member: int) -> Sample:
        """Return the decoded sample at a position of the shard.

        Raises: BadSample: if the sample cannot be used.
        """
        return decode_sample(self._samples[member], self._facts, self.name, self._keys[member])


def write_shard(path: Path, samples: Iterable[tuple[str, Encoded]]) -> ShardRecord | None:
    """Write `(key, {suffix: bytes})` samples and return the shard's record. Equal samples give equal bytes.

    Return None and write no file if there are no samples.
    """
    count = 0
    with replacing(path) as file:
        hashing = _HashingFile(file)
        with TarWriter(hashing, encoder=False, user="root", group="root", mode=0o444, mtime=0, compress=False) as tar:
            for key, encoded in samples:
                tar.write({"__key__": key, **encoded})
                count += 1
    if count == 0:
        path.unlink()
        return None
    return ShardRecord(name=path.name, bytes=hashing.size, sha256=hashing.digest.hexdigest(), samples=count)


def read_shard(folder: Path, record: ShardRecord, facts: DatasetFacts) -> TarShard:
    """Read a shard in one pass.

    Raises:
        BadShard: if size, checksum, members or the number of samples differ from the index.
        OSError: if the file system fails repeatedly.
    """
    data = _read_verified(folder, record)
    try:
        groups = list(group_by_keys(_members(record.name, data)))
    except (tarfile.TarError, ValueError) as error:
        raise BadShard("archive", record.name, f"cannot be read as a tar file: {error}") from error
    if len(groups) != record.samples:
        raise BadShard("count", record.name, f"holds {len(groups)} samples, the index says {record.samples}")
    keys = [group["__key__"] for group in groups]
    samples = [{suffix: value for suffix, value in group.items() if suffix[0] != "_"} for group in groups]
    return TarShard(record.name, samples, keys, facts)


def is_intact(folder: Path, record: ShardRecord) -> bool:
    """Return True if the shard's file has the size and the checksum of its record."""
    try:
        _read_verified(folder, record)
    except BadShard:
        return False
    return True


def _read_verified(folder: Path, record: ShardRecord) -> bytes:
    data = _read_patiently(folder / record.name)
    if len(data) != record.bytes:
        raise BadShard("size", record.name, f"has {len(data)} bytes, the index says {record.bytes}")
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise BadShard("checksum", record.name, "does not have the sha256 of the index")
    return data


def _read_patiently(path: Path) -> bytes:
    """Return the file's bytes. Errors of the file system are retried, then raised.

    Such an error never leads to a substitute sample, because the ranks would then disagree on it.

    Raises:
        BadShard: if the file is missing or is not a regular file, such as a FIFO.
        OSError: if reading fails for READ_ATTEMPTS times.
    """
    for attempt in range(1, READ_ATTEMPTS + 1):
        try:
            return read_regular(path)
        except (FileNotFoundError, NotADirectoryError, NotRegularFile, PermissionError) as error:
            raise BadShard("missing", path.name, f"cannot be opened in {path.parent}: {error.strerror}") from error
        except OSError:
            if attempt == READ_ATTEMPTS:
                raise
            time.sleep(attempt)
    raise AssertionError("unreachable")


def _members(name: str, data: bytes) -> Iterator[dict[str, Any]]:
    """Yield the members of a tar file in memory, in the form that webdataset groups.

    webdataset's own iterator silently skips links and devices, and unpacks a compressed tar of any size. A separate check
    before that iterator takes 73 ms instead of 31 ms for 2,048 members.

    Raises: BadShard: if a member is not a plain, small, named file.
    """
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            end = member.offset_data + member.size
            fault = _fault(member) or ("is cut off" if end > len(data) else None)
            if fault:
                raise BadShard("forbidden_member", name, f"member {member.name!r} {fault}")
            yield {"fname": member.name, "data": data[member.offset_data : end], "__url__": name}


def _fault(member: tarfile.TarInfo) -> str | None:
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        return "is not a plain file"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "has an absolute name or one with '..'"
    suffix = member.name.rpartition("/")[2].partition(".")[2].lower()
    if suffix not in ALLOWED_SUFFIXES:
        return f"has the suffix {suffix!r}; legal: {', '.join(sorted(ALLOWED_SUFFIXES))}"
    if member.size > MAX_MEMBER_BYTES:
        return f"has {member.size} bytes; legal: up to {MAX_MEMBER_BYTES}"
    return None


class _HashingFile:
    """A write-only stream that computes the size and the sha256 of the data written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.digest.update(data)
        return self._file.write(data)
