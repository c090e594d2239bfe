"""The index of a checkpoint: a rank opens the files that it needs, format 1 stays readable, node files are exact."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from sdit.checkpoint import store as store_module
from sdit.checkpoint.files import FORMAT, NODE_FORMAT, ShardPlace, read_manifest, shard_size, write_manifest
from sdit.checkpoint.find import find_checkpoint, verify_share
from sdit.checkpoint.index import ShardIndex, ShardTable
from sdit.checkpoint.load import load_model
from sdit.checkpoint.node_files import nodes_of, places_of
from sdit.checkpoint.shard_set import MAX_OPEN_FILES, ShardSet
from sdit.checkpoint.store import CheckpointStore, Snapshot, restore
from sdit.config import CheckpointConfig, load_config
from sdit.distributed.comm import Comm
from sdit.distributed.shards import Shard
from sdit.errors import CheckpointError, ConfigError
from tests.faults.test_checkpoint_faults import OneRank
from tests.stored_tensors import stored_tensor
from tests.unit.written_run import tiny_config, write_run

FIXTURE = Path(__file__).parents[1] / "data" / "checkpoint_format_1"
KINDS = ("weight", "exp_avg")
SHAPES = {"model.a": (64, 30), "model.b": (7,), "model.c": (50, 50), "model.d": (1,), "model.e": (999,)}
TOTAL = sum(int(np.prod(shape)) for shape in SHAPES.values())
_opened: list[str] | None = None


def _record(event: str, arguments: tuple) -> None:
    if event == "open" and _opened is not None and str(arguments[0]).endswith((".safetensors", ".shards")):
        _opened.append(str(arguments[0]))


sys.addaudithook(_record)  # cannot be removed; it does nothing outside `opens`


@contextmanager
def opens() -> Iterator[list[str]]:
    """The shard files that this process opens inside the `with`, one entry for each time."""
    global _opened
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


def values_of(kind: str) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(KINDS.index(kind))
    return {name: generator.normal(size=int(np.prod(shape))).astype(np.float32) for name, shape in SHAPES.items()}


def partition(rank: int, ranks: int) -> list[tuple[str, int, int]]:
    """Name, start and elements of the ranges that a rank has, as ZeRO cuts the concatenation of all tensors."""
    size, first, found = -(-TOTAL // ranks), 0, []
    for name, shape in SHAPES.items():
        numel = int(np.prod(shape))
        low, high = max(rank * size, first), min((rank + 1) * size, first + numel)
        if low < high:
            found.append((name, low - first, high - low))
        first += numel
    return found


def snapshot_of(rank: int, ranks: int, images: int = 8) -> Snapshot:
    tensors, shapes = {}, {}
    for kind in KINDS:
        values = values_of(kind)
        for name, start, count in partition(rank, ranks):
            tensors[f"{kind}/{name}@{start}"] = values[name][start : start + count]
            shapes[f"{kind}/{name}"] = SHAPES[name]
    facts = {"clock": {"images_seen": images, "steps": 1}, "config": {}}
    return Snapshot(images, tensors, shapes, facts)


class VirtualRank(OneRank):
    """A rank of `world` nodes with a rank each."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.is_first = rank, world, rank == 0

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.world


def save(folder: Path, ranks: int, nodes: list[int] | None = None) -> Path:
    """Write a checkpoint as `ranks` ranks do, one after another. With `nodes` the ranks of a node share a file."""
    folder.mkdir(exist_ok=True)
    snapshots = [snapshot_of(rank, ranks) for rank in range(ranks)]
    sizes = [shard_size(each.tensors, each.shapes) for each in snapshots]
    places: list[ShardPlace | None] = [None] * ranks if nodes is None else [*places_of(nodes, sizes)]
    for rank, (snapshot, place) in enumerate(zip(snapshots, places, strict=True)):
        store = CheckpointStore(folder, CheckpointConfig(), cast(Comm, VirtualRank(rank, ranks)))
        assert store.write_shard(snapshot, place) is None
    first = CheckpointStore(folder, CheckpointConfig(), cast(Comm, VirtualRank(0, ranks)))
    assert first.commit(snapshots[0]) is None
    return first.folder_of(8)


def load_rank(folder: Path, rank: int, ranks: int) -> None:
    """Restore the partition of one of `ranks` ranks, and compare it with what was saved."""
    pieces = partition(rank, ranks)
    local = [
        Shard(name, SHAPES[name], start, count, torch.empty(count), 0, cast(Any, None)) for name, start, count in pieces
    ]
    with ShardSet(folder, read_manifest(folder)) as shards:
        for kind in KINDS:
            values = [torch.full((count,), torch.nan) for _, _, count in pieces]
            restore(shards, kind, local, values, lambda _: None)
            for (name, start, count), found in zip(pieces, values, strict=True):
                assert np.array_equal(found.numpy(), values_of(kind)[name][start : start + count])


def most_opens(folder: Path, ranks: int) -> int:
    """The most shard files that one of `ranks` ranks opens to verify its share and to restore."""
    most = 0
    for rank in range(ranks):
        with opens() as found:
            verify_share(folder, read_manifest(folder), rank, ranks)
            load_rank(folder, rank, ranks)
        most = max(most, len(found))
    return most


def test_opens_of_a_rank_do_not_grow_with_the_ranks(tmp_path: Path) -> None:
    """A rank verifies one file and reads one file, at any number of ranks."""
    found = {ranks: most_opens(save(tmp_path / str(ranks), ranks), ranks) for ranks in (2, 8, 32)}
    assert found == {2: 2, 8: 2, 32: 2}


@pytest.mark.parametrize(("written", "read"), [(32, 8), (8, 32), (12, 5), (5, 12), (32, 1)])
def test_opens_grow_by_the_change_of_layout_only(tmp_path: Path, written: int, read: int) -> None:
    """A rank that reads a w-th part of the state touches at most ceil(W / w) + 1 of W files, and verifies ceil(W / w)."""
    folder, per_rank = save(tmp_path, written), -(-written // read)
    assert most_opens(folder, read) <= 2 * per_rank + 1


@pytest.mark.parametrize("nodes", [[0, 0], [0, 1], [0, 0, 1, 1], [0, 1, 0, 1]], ids=str)
def test_node_files_are_read_on_any_layout(tmp_path: Path, nodes: list[int]) -> None:
    folder = save(tmp_path, len(nodes), nodes)
    manifest = read_manifest(folder)
    assert manifest["format"] == NODE_FORMAT
    assert sorted(path.name for path in folder.glob("*.shards")) == [f"node-{n:05d}.shards" for n in sorted({*nodes})]
    assert find_checkpoint(folder).folder == folder
    for ranks in (1, 2, 4):
        for rank in range(ranks):
            load_rank(folder, rank, ranks)


def test_a_rank_without_state_has_no_shard_in_the_file_of_its_node(tmp_path: Path) -> None:
    ranks = TOTAL + 3  # more ranks than elements
    assert partition(ranks - 1, ranks) == []
    assert shard_size({}, {}) == 0
    assert places_of([0, 0, 1], [100, 0, 50]) == [
        ShardPlace("node-00000.shards", 0, 100),
        ShardPlace("node-00000.shards", 100, 100),
        ShardPlace("node-00001.shards", 0, 50),
    ]


@pytest.mark.parametrize(
    ("members", "nodes"),
    [
        ([("a", 0), ("a", 1), ("b", 0), ("b", 1)], [0, 0, 1, 1]),
        ([("a", 0), ("b", 0), ("a", 1), ("b", 1)], [0, 1, 0, 1]),  # cyclic
        ([("a", 0), ("a", 1), ("a", 0), ("a", 1)], [0, 0, 1, 1]),  # two nodes on one host
        ([("a", 0), ("a", 0)], [0, 1]),
        ([("a", 0), ("a", 1), ("a", 2), ("b", 0)], [0, 0, 0, 1]),  # uneven
    ],
)
def test_nodes_follow_from_hosts_and_local_ranks(members: list[tuple[str, int]], nodes: list[int]) -> None:
    assert nodes_of(members) == nodes


def test_another_kind_of_files_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.files: 'disk' is not legal .*'rank' or 'node'"):
        load_config(None, ["checkpoint.files=disk"])


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(truncate, "has .* bytes, the manifest says"), (flip, "does not match"), (Path.unlink, "cannot be read")],
)
def test_damage_of_a_node_file_is_named_with_its_range(
    tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    folder = save(tmp_path, 2, [0, 0])
    last = read_manifest(folder)["files"][1]
    damage(folder / "node-00000.shards")
    with pytest.raises(CheckpointError, match=rf"node-00000\.shards: bytes [0-9]+\.\.[0-9]+: .*{reason}") as caught:
        find_checkpoint(folder)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(CheckpointError, match=rf"bytes {last['start']}\.\.{last['file_bytes']}: "):
        verify_share(folder, read_manifest(folder), 1, 2)


def test_a_read_beyond_the_end_of_a_file_names_the_missing_bytes(tmp_path: Path) -> None:
    folder = save(tmp_path, 2, [0, 0])
    truncate(folder / "node-00000.shards")
    with pytest.raises(CheckpointError, match=r"node-00000\.shards: bytes [0-9]+\.\.[0-9]+ are missing"):
        load_rank(folder, 1, 2)


def test_many_files_are_not_open_at_the_same_time(tmp_path: Path) -> None:
    ranks = 2 * MAX_OPEN_FILES
    folder = save(tmp_path, ranks)
    with ShardSet(folder, read_manifest(folder)) as shards:
        assert np.array_equal(stored_tensor(shards, "weight/model.a").view(-1).numpy(), values_of("weight")["model.a"])
        held = [link for link in Path("/proc/self/fd").iterdir() if str(folder) in os.path.realpath(link)]
    assert 0 < len(held) <= MAX_OPEN_FILES


def digest_of(folder: Path) -> tuple[int, str]:
    found = hashlib.sha256()
    with ShardSet(folder, find_checkpoint(folder).manifest) as shards:
        for name in sorted(shards.shapes):
            found.update(name.encode() + stored_tensor(shards, name).numpy().tobytes())
        return len(shards.shapes), found.hexdigest()


def test_a_checkpoint_of_two_ranks_without_an_index_is_read_bit_for_bit() -> None:
    """The stored checkpoint was written before there was an index. Its expected hash was computed by that version."""
    folder, expected = FIXTURE / "images-000000000016", json.loads((FIXTURE / "expected.json").read_text())
    manifest = read_manifest(folder)
    assert manifest["format"] == FORMAT and "index" not in manifest and len(manifest["files"]) == 2
    assert digest_of(folder) == (expected["tensors"], expected["sha256"])


def test_a_checkpoint_with_an_index_is_still_of_format_1(tmp_path: Path) -> None:
    """An older version reads it: it ignores the index and reads the headers."""
    folder = save(tmp_path, 4)
    manifest = read_manifest(folder)
    assert manifest["format"] == FORMAT and set(manifest["files"][0]) == {"name", "size_bytes", "xxh3"}
    with_index = digest_of(folder)
    del manifest["index"]
    write_manifest(folder, manifest)
    assert digest_of(folder) == with_index


def test_an_index_that_is_too_large_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_RANGES", 3)
    folder = save(tmp_path, 4, [0, 0, 1, 1])
    assert "index" not in read_manifest(folder) and find_checkpoint(folder).folder == folder
    for rank in range(3):
        load_rank(folder, rank, 3)


def unpack(index: dict[str, Any]) -> np.ndarray:
    data = zlib.decompress(base64.b64decode(index["ranges"]))
    return np.cumsum(np.frombuffer(data, "<i8").reshape(5, -1), axis=1)


def pack(index: dict[str, Any], columns: np.ndarray) -> None:
    packed = zlib.compress(np.diff(columns, axis=1, prepend=0).astype("<i8").tobytes())
    index["ranges"] = base64.b64encode(packed).decode()


def with_column(number: int, row: int, change: Callable[[int], int]) -> Callable[[dict], None]:
    def apply(index: dict[str, Any]) -> None:
        columns = unpack(index)
        columns[number, row] = change(int(columns[number, row]))
        pack(index, columns)

    return apply


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "not base64": lambda index: index.update(ranges="?"),
    "not zlib": lambda index: index.update(ranges="AAAA"),
    "fewer rows": lambda index: index.update(count=index["count"] - 1),
    "more rows": lambda index: index.update(count=index["count"] + 1),
    "endless rows": lambda index: index.update(count=1 << 40),
    "a bomb": lambda index: index.update(ranges=base64.b64encode(zlib.compress(bytes(1 << 24))).decode()),
    "no kinds": lambda index: index.update(kinds=[]),
    "a shape as text": lambda index: index["shapes"].update({"model.a": "64"}),
    "a smaller shape": lambda index: index["shapes"].update({"model.a": [1]}),
    "a huge shape": lambda index: index["shapes"].update({"model.a": [2**62] * 60}),
    "a shape without name": lambda index: index["shapes"].pop("model.a"),
    "an unknown tensor": with_column(0, -1, lambda value: 1 << 40),
    "a negative start": with_column(1, 0, lambda value: -1),
    "a moved range": with_column(1, 0, lambda value: value + 1),
    "a longer range": with_column(2, 0, lambda value: value + 1),
    "a long range": with_column(2, 0, lambda value: 1 << 61),
    "an unknown shard": with_column(3, 0, lambda value: 7),
    "another shard": with_column(3, 0, lambda value: 1 - value),
    "bytes beyond the shard": with_column(4, 0, lambda value: 1 << 40),
    "bytes before the tensor": with_column(4, 0, lambda value: value - 4),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_an_index_that_does_not_fit_its_shards_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    folder = save(tmp_path, 2)
    manifest = read_manifest(folder)
    DAMAGE[kind](manifest["index"])
    write_manifest(folder, manifest)
    with pytest.raises(CheckpointError, match=folder.name) as caught:
        find_checkpoint(folder)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 1000


def test_the_index_grows_by_the_ranks_not_by_ranks_times_tensors(tmp_path: Path) -> None:
    """Each further rank cuts at most one more tensor of each kind. The rows of XL/2 take at most 12 bytes each."""
    shapes = {f"model.blocks.{n}.weight": (1152, 1152) for n in range(300)}
    total, rows = 300 * 1152**2, {}
    for ranks in (64, 4096):
        size, tables = -(-total // ranks), []
        for rank in range(ranks):
            low, high = rank * size, min(total, (rank + 1) * size)
            names = [f"model.blocks.{n}.weight" for n in range(low // 1152**2, -(-high // 1152**2))]
            starts = [max(0, low - n * 1152**2) for n in range(low // 1152**2, -(-high // 1152**2))]
            counts = [
                min(1152**2, high - n * 1152**2) - start
                for n, start in zip(range(low // 1152**2, 10**6), starts, strict=False)
            ]
            ranges = {
                f"{kind}/{name}@{start}": (4096 + 4 * start, count)
                for kind in KINDS
                for name, start, count in zip(names, starts, counts, strict=True)
            }
            tables.append(ShardTable(ranges, {f"{kind}/{name}": shapes[name] for kind in KINDS for name in names}))
        stored = ShardIndex.of(tables).to_json()
        rows[ranks] = stored["count"]
        assert len(stored["ranges"]) <= 12 * stored["count"]
    assert rows[4096] <= len(KINDS) * (300 + 4096) and rows[64] <= len(KINDS) * (300 + 64)


def test_an_exported_model_is_the_same_with_and_without_an_index(tmp_path: Path) -> None:
    models = write_run(tmp_path / "run", tiny_config())
    checkpoint = next((tmp_path / "run" / "checkpoints").iterdir())
    manifest = read_manifest(checkpoint)
    assert "index" not in manifest
    with ShardSet(checkpoint, manifest) as shards:
        index = shards._index.to_json()
    shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    write_manifest(tmp_path / checkpoint.name, {**manifest, "index": index})
    for folder in (checkpoint, tmp_path / checkpoint.name):
        loaded = dict(load_model(folder).model.named_parameters())
        for name, parameter in models["ema"].named_parameters():
            assert torch.equal(loaded[name], parameter)
