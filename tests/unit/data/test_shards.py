"""Laws of the shard files: exact, whole or refused, and never partly believed."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sdit.data.bad_samples import BadSample, BadShard
from sdit.data.decode import encode_png
from sdit.data.index import DatasetFacts, ShardRecord, read_index
from sdit.data.shards import MAX_MEMBER_BYTES, READ_ATTEMPTS, read_shard, write_shard
from sdit.errors import DataError

HEADER = tarfile.BLOCKSIZE
FACTS = DatasetFacts(kind="images", total=5, channels=1, size=4, classes=10)


def forged(folder: Path, data: bytes, samples: int, name: str = "shard-000000.tar") -> ShardRecord:
    """Writes `data` as a shard whose record vouches for it."""
    (folder / name).write_bytes(data)
    return ShardRecord(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), samples=samples)


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for member, data in members:
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def plain(name: str, data: bytes = b"1") -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo(name), data


def special(name: str, kind: bytes, target: str = "/etc/passwd") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


# A sample is cls header, cls data, png header, png data: four blocks, as a 4 x 4 PNG fits in one.
SAMPLE = 4 * tarfile.BLOCKSIZE
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut between two samples": lambda data: data[: 2 * SAMPLE],
    "cut between two members": lambda data: data[: 2 * SAMPLE + SAMPLE // 2],
    "cut inside a header": lambda data: data[: 2 * SAMPLE + HEADER // 2],
    "cut inside the data": lambda data: data[: 2 * SAMPLE + 3 * HEADER + 20],
    "zero bytes": lambda data: b"",
    "only zeros": lambda data: bytes(len(data)),
    "a bit of a header": lambda data: flipped(data, SAMPLE + 3),
    "a bit of a member's size": lambda data: flipped(data, SAMPLE + 2 * HEADER + 133),
    "a bit of a label": lambda data: flipped(data, SAMPLE + HEADER),
    "a bit of an image": lambda data: flipped(data, SAMPLE + 3 * HEADER + 45),
    "garbage": lambda data: b"garbage" * 1000,
}


@pytest.fixture
def folder(tmp_path: Path, pictures: SimpleNamespace) -> Path:
    written: Path = pictures.write_folder(tmp_path / "set", [5])
    return written


def test_a_shard_gives_back_what_was_written(folder: Path, pictures: SimpleNamespace) -> None:
    index = read_index(folder)
    shard = read_shard(folder, index.shards[0], index.facts)
    assert len(shard) == 5
    for member in range(5):
        sample = shard.sample(member)
        assert np.array_equal(sample.values, pictures.picture(member)) and sample.label == member


def test_webdataset_reads_the_shards_as_its_own(folder: Path, pictures: SimpleNamespace) -> None:
    from webdataset import WebDataset  # type: ignore[import-untyped]

    samples = list(WebDataset(str(folder / "shard-000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(5)]
    assert all(sample["png"] == encode_png(pictures.picture(number)) for number, sample in enumerate(samples))


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    samples = [("000", {"png": encode_png(np.zeros((3, 4, 4), np.uint8)), "cls": b"0"})]
    first, second = (write_shard(tmp_path / f"{name}.tar", samples) for name in "ab")
    assert first is not None and second is not None
    assert first.sha256 == second.sha256 == hashlib.sha256((tmp_path / "a.tar").read_bytes()).hexdigest()


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def samples() -> object:
        yield "000", {"cls": b"0"}
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_shard(tmp_path / "a.tar", samples())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_shard_is_refused_by_name(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    index = read_index(folder)
    path = folder / index.shards[0].name
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    with pytest.raises(BadShard, match=r"shard-000000\.tar") as caught:
        read_shard(folder, index.shards[0], index.facts)
    same_size = len(damaged) == index.shards[0].bytes
    assert caught.value.reason == ("checksum" if same_size else "size")


@pytest.mark.parametrize("damage", [damage for name, damage in DAMAGE.items() if name != "zero bytes"])
def test_damage_that_the_checksum_vouches_for_never_gives_a_wrong_image(
    folder: Path, pictures: SimpleNamespace, damage: Callable[[bytes], bytes]
) -> None:
    record = forged(folder, damage((folder / "shard-000000.tar").read_bytes()), samples=5)
    try:
        shard = read_shard(folder, record, FACTS)
    except BadShard:
        return
    for member in range(5):
        try:
            assert np.array_equal(shard.sample(member).values, pictures.picture(member))
        except BadSample as fault:
            assert fault.key == f"{member:09d}" and fault.shard == "shard-000000.tar"


def test_a_deleted_shard_is_missing(folder: Path) -> None:
    index = read_index(folder)
    (folder / index.shards[0].name).unlink()
    with pytest.raises(BadShard, match=r"shard-000000\.tar: cannot be opened .*missing"):
        read_shard(folder, index.shards[0], index.facts)


@pytest.mark.parametrize(
    "member",
    [
        plain("0.pyd"),
        plain("0.pth"),
        plain("0.pickle"),
        plain("0.pkl"),
        plain("0.npy.gz"),
        plain("0.PTH"),
        plain("0"),
        plain("/0.cls"),
        plain("a/../../0.cls"),
        plain("../0.cls"),
        plain("0.txt", bytes(MAX_MEMBER_BYTES + 1)),
        special("0.png", tarfile.SYMTYPE),
        special("0.png", tarfile.LNKTYPE),
        special("0.png", tarfile.CHRTYPE),
        special("0.png", tarfile.BLKTYPE),
        special("0.png", tarfile.FIFOTYPE),
        special("0.png", tarfile.DIRTYPE),
        special("0.png", tarfile.CONTTYPE),
        special("0.png", tarfile.GNUTYPE_SPARSE),
    ],
    ids=lambda member: f"{member[0].name} {member[0].type!r}",
)
def test_hostile_members_are_refused(tmp_path: Path, member: tuple[tarfile.TarInfo, bytes]) -> None:
    record = forged(tmp_path, tar_of(plain("0.cls"), member), samples=1)
    with pytest.raises(BadShard) as caught:
        read_shard(tmp_path, record, FACTS)
    assert caught.value.reason == "forbidden_member" and repr(member[0].name) in str(caught.value)


def test_a_sparse_file_in_plain_disguise_is_refused(tmp_path: Path) -> None:
    member, content = plain("0.npy", b"1\n0\n1\n".ljust(tarfile.BLOCKSIZE, b"\0") + b"x")
    sparse = {"major": "1", "minor": "0", "name": "0.npy", "realsize": "1000000"}
    member.pax_headers = {f"GNU.sparse.{key}": value for key, value in sparse.items()}
    with pytest.raises(BadShard, match=r"member '0\.npy' is not a plain file"):
        read_shard(tmp_path, forged(tmp_path, tar_of(plain("0.cls"), (member, content)), samples=1), FACTS)


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("0.cls"))
    with pytest.raises(BadShard, match="archive"):
        read_shard(tmp_path, forged(tmp_path, stream.getvalue(), samples=1), FACTS)


def test_a_key_whose_members_are_apart_does_not_count_as_one_sample(tmp_path: Path) -> None:
    png = encode_png(np.zeros((1, 4, 4), np.uint8))
    data = tar_of(plain("0.cls"), plain("1.cls"), plain("0.png", png), plain("1.png", png))
    with pytest.raises(BadShard, match="holds 4 samples, the index says 2"):
        read_shard(tmp_path, forged(tmp_path, data, samples=2), FACTS)


def test_a_member_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadShard, match="archive"):
        read_shard(tmp_path, forged(tmp_path, tar_of(plain("0.cls"), plain("0.cls")), samples=1), FACTS)


@pytest.mark.parametrize("name", ["shard-000000.tar", "index.json"])
def test_a_fifo_in_the_place_of_a_file_is_refused_at_once(folder: Path, name: str) -> None:
    """Reading a FIFO would wait for a writer for ever."""
    index = read_index(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    if name == "index.json":
        with pytest.raises(DataError, match="is a FIFO"):
            read_index(folder)
    else:
        with pytest.raises(BadShard, match="is a FIFO"):
            read_shard(folder, index.shards[0], index.facts)


@pytest.mark.parametrize("failures", [READ_ATTEMPTS - 1, READ_ATTEMPTS])
def test_file_system_errors_are_retried_then_raised_as_such(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    index = read_index(folder)
    read_bytes, calls = Path.read_bytes, []

    def stale(path: Path) -> bytes:
        calls.append(path)
        if len(calls) <= failures:
            raise OSError(116, "Stale file handle")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", stale)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    if failures < READ_ATTEMPTS:
        assert len(read_shard(folder, index.shards[0], index.facts)) == 5
    else:
        with pytest.raises(OSError, match="Stale"):
            read_shard(folder, index.shards[0], index.facts)


def test_webdataset_runs_in_its_secure_mode() -> None:
    from webdataset import utils  # type: ignore[import-untyped]

    assert utils.enforce_security
