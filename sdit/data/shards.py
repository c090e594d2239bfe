"""One tar shard: written durably with webdataset, then read whole, verified, and parsed in memory."""

from __future__ import annotations

import hashlib
import io
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from webdataset.tariterators import group_by_keys  # type: ignore[import-untyped]
from webdataset.writer import TarWriter  # type: ignore[import-untyped]

from sdit.checked_files import NotRegularFile, read_regular
from sdit.data.bad_samples import BadShard
from sdit.data.decode import ALLOWED_SUFFIXES, DecodedSamples, Sample, decode_sample
from sdit.data.index import DatasetFacts, ShardRecord
from sdit.data.latents import decode_latents
from sdit.data.tar_headers import SampleSpans, Spans, group_members, plain_members
from sdit.files import replacing

MAX_MEMBER_BYTES = 64 * 2**20
READ_ATTEMPTS = 3
Encoded = Mapping[str, bytes]
Content = TypeVar("Content")


class TarShard:
    """The samples of one verified shard, in memory. Latents are decoded when it is opened, images when they are read."""

    def __init__(self, name: str, data: bytes, samples: SampleSpans, facts: DatasetFacts) -> None:
        """Take the bytes of the archive, and where its samples are in `data`."""
        self.name = name
        self.decoded: DecodedSamples | None = None
        self._samples, self._facts = samples, facts
        if facts.kind == "latents":
            self.decoded = decode_latents(data, samples, facts)
        is_decoded = self.decoded is not None and bool((self.decoded.row >= 0).all())
        self._data = memoryview(b"" if is_decoded else data)

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, member: int) -> Sample:
        """Return the sample at a position of the shard, decoded.

        Raises: BadSample: if the sample cannot be used.
        """
        if self.decoded is not None and self.decoded.row[member] >= 0:
            return Sample(self.decoded.values[self.decoded.row[member]], int(self.decoded.labels[member]))
        encoded = {suffix: bytes(self._data[span]) for suffix, span in self._samples.spans(member).items()}
        return decode_sample(encoded, self._facts, self.name, self._samples.keys[member])


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
        samples = _plain_samples(data) or SampleSpans.of(_samples(record.name, data))
    except (tarfile.TarError, ValueError) as error:
        raise BadShard("archive", record.name, f"cannot be read as a tar file: {error}") from error
    if len(samples) != record.samples:
        raise BadShard("count", record.name, f"holds {len(samples)} samples, the index says {record.samples}")
    return TarShard(record.name, data, samples, facts)


def is_intact(folder: Path, record: ShardRecord) -> bool:
    """Return True if the shard's file has the size and the checksum of its record."""
    try:
        _read_verified(folder, record)
    except BadShard:
        return False
    return True


def _read_verified(folder: Path, record: ShardRecord) -> bytes:
    path = folder / record.name
    data = patiently(lambda: read_regular(path), path.name, f" in {path.parent}")
    if len(data) != record.bytes:
        raise BadShard("size", record.name, f"has {len(data)} bytes, the index says {record.bytes}")
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise BadShard("checksum", record.name, "does not have the sha256 of the index")
    return data


def patiently(read: Callable[[], Content], name: str, place: str = "") -> Content:
    """Return `read()` of the file `name`. Errors of the file system are retried, then raised.

    Such an error never leads to a substitute sample, because the ranks would then disagree on it.

    Raises:
        BadShard: if the file is missing or is not a regular file, such as a FIFO. `place` is part of the message.
        OSError: if reading fails for READ_ATTEMPTS times.
    """
    for attempt in range(1, READ_ATTEMPTS + 1):
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError, NotRegularFile, PermissionError) as error:
            raise BadShard("missing", name, f"cannot be opened{place}: {error.strerror}") from error
        except OSError:
            if attempt == READ_ATTEMPTS:
                raise
            time.sleep(attempt)
    raise AssertionError("unreachable")


def _plain_samples(data: bytes) -> SampleSpans | None:
    """Return what `_samples` yields for an archive of the form that `write_shard` writes. Return None for any other form."""
    members = plain_members(data)
    if members is None or (members.stops - members.starts > MAX_MEMBER_BYTES).any():
        return None
    return group_members(members)


def _samples(name: str, data: bytes) -> Iterator[tuple[str, Spans]]:
    """Yield the key of each sample and where its members are in `data`, as webdataset groups the members of a tar file.

    Raises:
        BadShard: if a member is not a plain, small, named file.
        TarError, ValueError: if it is not a tar file, or a member occurs twice.
    """
    for group in group_by_keys(_members(name, data)):
        yield group["__key__"], {suffix: span for suffix, span in group.items() if suffix[0] != "_"}


def _members(name: str, data: bytes) -> Iterator[dict[str, Any]]:
    """Yield the members of a tar file in memory, in the form that webdataset groups. "data" is the span of a member.

    webdataset's own iterator silently skips links and devices, and unpacks a compressed tar of any size.

    Raises: BadShard: if a member is not a plain, small, named file.
    """
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            end = member.offset_data + member.size
            fault = _fault(member) or ("is cut off" if end > len(data) else None)
            if fault:
                raise BadShard("forbidden_member", name, f"member {member.name!r} {fault}")
            yield {"fname": member.name, "data": slice(member.offset_data, end), "__url__": name}


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
