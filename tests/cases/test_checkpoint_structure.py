"""Checkpoints and weight files whose content is malformed although their checksums fit, and weights that are not finite."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import xxhash
from safetensors.numpy import load_file, save_file

from sdit.checkpoint.files import write_manifest
from sdit.checkpoint.find import find_checkpoint, list_checkpoints
from sdit.checkpoint.store import CheckpointStore, Snapshot
from sdit.config import CheckpointConfig, Config
from sdit.distributed.comm import Comm
from sdit.errors import CheckpointError, ExitCode
from tests.distributed.forks import run_script
from tests.distributed.harness import ROOT
from tests.faults.test_checkpoint_faults import OneRank
from tests.unit.written_run import tiny_config, write_run

IMAGES = 28
SHARD = "shard-00000.safetensors"
READERS = {
    "sample": ("--out", "out.png"),
    "export": ("--out", "out.safetensors"),
    "routing": ("--out", "out.png"),
    "evaluate": ("--images", "64", "--reference", "digits", "--out", "out.json"),
}
HANG_SECONDS = 60.0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one good checkpoint."""
    write_run(tmp_path / "run", tiny_config(), IMAGES)
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """A reader that hangs on a FIFO, or reads without end, fails after 15 s or 4 GiB."""

    def expire(*_: object) -> None:
        pytest.fail("the reader hangs")  # no OSError, which readers report

    before, (soft, hard) = signal.signal(signal.SIGALRM, expire), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), hard))
    signal.alarm(15)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / f"images-{IMAGES:012d}"


def body_of(folder: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["body"]
    return body


def reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest's body and give it a fitting checksum."""
    body = body_of(folder)
    change(body)
    write_manifest(folder, body)


def rewrite_shard(folder: Path, data: bytes) -> None:
    """Replace the first shard, with a record that fits."""
    (folder / SHARD).write_bytes(data)

    def record(body: dict[str, Any]) -> None:
        body["files"][0] |= {"size_bytes": len(data), "xxh3": xxhash.xxh3_128(data).hexdigest()}

    reseal(folder, record)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: str, payload: bytes) -> bytes:
    text = header.encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + payload


def with_header(change: Callable[[dict[str, Any], str], object]) -> Callable[[Path], None]:
    """A shard whose header `change(header, name of its first tensor)` altered."""

    def apply(folder: Path) -> None:
        header, payload = split((folder / SHARD).read_bytes())
        change(header, next(key for key in header if key != "__metadata__"))
        rewrite_shard(folder, join(json.dumps(header), payload))

    return apply


def with_body(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: reseal(folder, lambda body: body.update(fields))


def with_file(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: reseal(folder, lambda body: body["files"][0].update(fields))


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: reseal(folder, lambda body: body.pop(name))


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def deep_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"sha256": "0", "body": ' + "[" * 100_000 + "]" * 100_000 + "}")


def outside(folder: Path) -> None:
    shutil.move(folder / SHARD, folder.parent / SHARD)
    with_file(name=f"../{SHARD}")(folder)


def absolute(folder: Path) -> None:
    shutil.move(folder / SHARD, folder.parent / SHARD)
    with_file(name=str(folder.parent / SHARD))(folder)


def linked(folder: Path) -> None:
    shutil.move(folder / SHARD, folder.parent / SHARD)
    (folder / SHARD).symlink_to(folder.parent / SHARD)


def linked_manifest(folder: Path) -> None:
    shutil.move(folder / "manifest.json", folder.parent / "manifest.json")
    (folder / "manifest.json").symlink_to(folder.parent / "manifest.json")


def replaced_by(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return apply


def to_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def twice(folder: Path) -> None:
    reseal(folder, lambda body: body["files"].append(body["files"][0]))


def key_twice(folder: Path) -> None:
    header, payload = split((folder / SHARD).read_bytes())
    name = next(key for key in header if key != "__metadata__")
    text = json.dumps(header)
    rewrite_shard(folder, join(f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}", payload))


def long_header(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    rewrite_shard(folder, struct.pack("<Q", len(data) * 2) + data[8:])


def endless_header(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    rewrite_shard(folder, struct.pack("<Q", 2**64 - 1) + data[8:])


def deep_header(folder: Path) -> None:
    rewrite_shard(folder, join('{"x": ' + "[" * 50_000 + "]" * 50_000 + "}", b""))


def deep_shapes(folder: Path) -> None:
    header, payload = split((folder / SHARD).read_bytes())
    header["__metadata__"]["shapes"] = "[" * 50_000 + "]" * 50_000
    rewrite_shard(folder, join(json.dumps(header), payload))


def piece_beyond(folder: Path) -> None:
    header, payload = split((folder / SHARD).read_bytes())
    name = next(key for key in header if key != "__metadata__")
    header[f"{name.rpartition('@')[0]}@{10**9}"] = header.pop(name)
    rewrite_shard(folder, join(json.dumps(header), payload))


def same_piece_in_two_shards(folder: Path) -> None:
    shutil.copy(folder / SHARD, folder / "shard-00002.safetensors")
    reseal(folder, lambda body: body["files"].append({**body["files"][0], "name": "shard-00002.safetensors"}))


NO_SAMPLES = {"ranks": 2, "place": [], "at_hand": []}  # a layout of token-routed experts only
MANIFESTS: dict[str, Callable[[Path], None]] = {
    "deep manifest": deep_manifest,
    "deep field": with_body(extra=nested(200)),
    "name outside": outside,
    "absolute name": absolute,
    "name with a line break": with_file(name=f"{SHARD}\n"),
    "name of a folder": with_file(name="."),
    "name twice": twice,
    "size as text": with_file(size_bytes="12"),
    "negative size": with_file(size_bytes=-1),
    "huge size": with_file(size_bytes=2**80),
    "checksum as number": with_file(xxh3=12),
    "files as text": with_body(files="shard-00000.safetensors"),
    "files empty": with_body(files=[]),
    "files missing": without("files"),
    "clock missing": without("clock"),
    "clock as list": with_body(clock=[1, 2]),
    "clock NaN": with_body(clock={"images_seen": float("nan"), "steps": 7}),
    "clock infinite": with_body(clock={"images_seen": IMAGES, "steps": float("inf")}),
    "clock negative": with_body(clock={"images_seen": -28, "steps": 7}),
    "clock huge": with_body(clock={"images_seen": IMAGES, "steps": 10**30}),
    "clock left out": with_body(clock={"images_seen": IMAGES, "steps": 7, "left_out": [[1]]}),
    "clock of another moment": with_body(clock={"images_seen": 4, "steps": 1}),
    "config missing": without("config"),
    "config as list": with_body(config=[1]),
    "prior columns": with_body(prior_columns=[0, 0, 99]),
    "expert layout": with_body(expert_layout={"ranks": 2, "place": [[0, 7]], "at_hand": [[True, False]]}),
    "token layout beyond ranks": with_body(
        expert_layout={**NO_SAMPLES, "token_place": [[0, 2]], "token_counts": [[5, 1]]}
    ),
    "token layout without counts": with_body(expert_layout={**NO_SAMPLES, "token_place": [[0, 1]]}),
    "token layout of unequal blocks": with_body(
        expert_layout={**NO_SAMPLES, "token_place": [[0, 1], [0]], "token_counts": [[5, 1], [5]]}
    ),
    "token counts below zero": with_body(
        expert_layout={**NO_SAMPLES, "token_place": [[0, 1]], "token_counts": [[5, -1]]}
    ),
    "extra NaN": with_body(extra={"number": float("nan")}),
    "body as list": lambda folder: write_manifest(folder, cast(dict, [1, 2])),
    "manifest is a FIFO": replaced_by("manifest.json", os.mkfifo),
    "manifest is endless": replaced_by("manifest.json", to_zero),
    "manifest is a folder": replaced_by("manifest.json", os.mkdir),
    "manifest is linked": linked_manifest,
}
SHARDS: dict[str, Callable[[Path], None]] = {
    "shard is a FIFO": replaced_by(SHARD, os.mkfifo),
    "shard is endless": replaced_by(SHARD, to_zero),
    "shard is a folder": replaced_by(SHARD, os.mkdir),
    "shard is linked": linked,
    "header beyond the file": long_header,
    "header without end": endless_header,
    "header deep": deep_header,
    "header is a list": lambda folder: rewrite_shard(folder, join("[1, 2]", b"")),
    "shard empty": lambda folder: rewrite_shard(folder, b""),
    "key twice": key_twice,
    "shapes deep": deep_shapes,
    "shapes as list": with_header(lambda header, _: header["__metadata__"].update(shapes="[1]")),
    "shapes negative": with_header(lambda header, name: header["__metadata__"].update(shapes='{"x": [-1]}')),
    "metadata of numbers": with_header(lambda header, _: header["__metadata__"].update(shapes=1)),
    "offset negative": with_header(lambda header, name: header[name].update(data_offsets=[-4, 4])),
    "offset beyond": with_header(lambda header, name: header[name].update(data_offsets=[0, 2**62])),
    "offset overflows": with_header(lambda header, name: header[name].update(data_offsets=[2**64 - 4, 2**64])),
    "offset as text": with_header(lambda header, name: header[name].update(data_offsets="04")),
    "shape overflows": with_header(lambda header, name: header[name].update(shape=[2**62, 2**62])),
    "shape of thousands": with_header(lambda header, name: header[name].update(shape=[2**62] * 5000)),
    "shape of two": with_header(lambda header, name: header[name].update(shape=[1, header[name]["shape"][0]])),
    "dtype unknown": with_header(lambda header, name: header[name].update(dtype="F31")),
    "dtype other": with_header(lambda header, name: header[name].update(dtype="I32")),
    "key without start": with_header(lambda header, name: header.update({"weight": header.pop(name)})),
    "key with long start": with_header(
        lambda header, name: header.update({f"{name.rpartition('@')[0]}@{'9' * 5000}": header.pop(name)})
    ),
    "overlap": with_header(
        lambda header, name: header.update({f"{name.rpartition('@')[0]}@1": dict(header[name])})
    ),
    "piece beyond its tensor": piece_beyond,
    "piece in two shards": same_piece_in_two_shards,
}  # fmt: skip


def assert_one_line(error: BaseException) -> None:
    assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000, str(error)


@pytest.mark.parametrize("kind", [*MANIFESTS, *SHARDS])
def test_a_malformed_checkpoint_is_refused_by_name_although_its_seal_fits(run: Path, kind: str) -> None:
    """S8: A manifest or shard that is malformed is refused in one line; nothing outside the folder is read."""
    from sdit.checkpoint.load import load_model

    (MANIFESTS | SHARDS)[kind](checkpoint_of(run))
    with pytest.raises(CheckpointError, match=checkpoint_of(run).name) as caught:
        load_model(checkpoint_of(run))
    assert_one_line(caught.value)


@pytest.mark.parametrize("kind", [*MANIFESTS, *sorted(SHARDS.keys() - {"piece in two shards"})])
def test_a_resume_passes_over_a_malformed_checkpoint(run: Path, kind: str) -> None:
    """S8: On resume a malformed checkpoint is passed over by name, and refused when its path is asked for."""
    older = checkpoint_of(run).with_name("images-000000000004")
    shutil.copytree(checkpoint_of(run), older)
    reseal(older, lambda body: body.update(clock={"images_seen": 4, "steps": 1}))
    (MANIFESTS | SHARDS)[kind](checkpoint_of(run))
    store = CheckpointStore(run / "checkpoints", CheckpointConfig(), cast(Comm, OneRank()))
    found = store.find()
    assert found is not None and found.folder == older and checkpoint_of(run).name in found.skipped[0]
    asked = CheckpointConfig(resume=str(checkpoint_of(run)))
    with pytest.raises(CheckpointError, match=checkpoint_of(run).name) as caught:
        CheckpointStore(run / "checkpoints", asked, cast(Comm, OneRank())).find()
    assert_one_line(caught.value)


@pytest.fixture
def unbounded(bounded: None) -> None:
    """Commands in processes of their own have a time limit of their own."""
    signal.alarm(0)
    resource.setrlimit(resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS)[1:] * 2)


def launched(reader: str, checkpoint: Path, folder: Path) -> tuple[int | None, str]:
    """Exit status (None: it hangs) and output of a command that runs in `folder`."""
    words = ["--checkpoint", checkpoint, *READERS[reader]]
    with contextlib.chdir(folder):
        return run_script(ROOT / "launcher" / f"{reader}.py", words, os.environ, folder / "log", HANG_SECONDS)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.usefixtures("unbounded")
def test_every_reader_refuses_a_fifo_in_one_line(run: Path, tmp_path: Path, reader: str) -> None:
    """S8: A FIFO in a checkpoint is refused with 74 and does not hang any command."""
    SHARDS["shard is a FIFO"](checkpoint_of(run))
    status, output = launched(reader, run, tmp_path)
    assert status == ExitCode.IO, output
    assert output.count("\n") == 1 and "FIFO" in output and not (tmp_path / READERS[reader][-1]).exists()


def overwrite(folder: Path, kind: str, value: float) -> str:
    """Put `value` into the last element of the first tensor of a kind in the shard; return the tensor's name."""
    data = bytearray((folder / SHARD).read_bytes())
    header, payload = split(bytes(data))
    key = next(key for key in header if key.startswith(f"{kind}/"))
    end = len(data) - len(payload) + header[key]["data_offsets"][1]
    data[end - 4 : end] = struct.pack("<f", value)
    rewrite_shard(folder, bytes(data))
    return str(key.rpartition("@")[0])


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.usefixtures("unbounded")
def test_every_reader_refuses_weights_that_hold_nan(run: Path, tmp_path: Path, reader: str) -> None:
    """R11: Weights that hold a NaN are refused with 74, and the tensor is named."""
    name = overwrite(checkpoint_of(run), "ema", float("nan"))
    status, output = launched(reader, run, tmp_path)
    assert status == ExitCode.IO and f"{name} holds NaN" in output, output
    assert output.count("\n") == 1 and not (tmp_path / READERS[reader][-1]).exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("kind", ["weight", "ema"])
def test_a_checkpoint_with_weights_that_are_not_finite_is_passed_over(run: Path, kind: str, value: float) -> None:
    """R11: A resume or a reader of the run takes the older checkpoint and names the tensor of the newer one."""
    older = checkpoint_of(run).with_name("images-000000000004")
    shutil.copytree(checkpoint_of(run), older)
    reseal(older, lambda body: body.update(clock={"images_seen": 4, "steps": 1}))
    name = overwrite(checkpoint_of(run), kind, value)
    for found in (
        find_checkpoint(run),
        CheckpointStore(run / "checkpoints", CheckpointConfig(), cast(Comm, OneRank())).find(),
    ):
        assert found is not None and found.folder == older
        assert name in found.skipped[0] and "NaN or infinite" in found.skipped[0]


@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq"])
def test_moments_that_are_not_finite_are_passed_over(tmp_path: Path, kind: str) -> None:
    """R11: An optimizer moment that holds NaN, not only a weight, makes a resume pass over the checkpoint."""
    store = CheckpointStore(tmp_path, CheckpointConfig(), cast(Comm, OneRank()))
    values = np.ones(1 << 16, dtype=np.float32)
    for images in (10, 20):
        facts = {"clock": {"images_seen": images, "steps": 1}, "config": {}}
        store.save(Snapshot(images, {f"{kind}/w@0": values}, {f"{kind}/w": values.shape}, facts))
        values[12345] = np.nan
    found = store.find()
    assert found is not None and found.folder.name == "images-000000000010"
    assert f"{kind}/w holds NaN" in found.skipped[0]


def exported(run: Path) -> Path:
    from sdit.checkpoint.export import export_safetensors

    export_safetensors(run, run / "model.safetensors", "ema", torch.float32)
    return run / "model.safetensors"


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_published_file_with_weights_that_are_not_finite_is_refused(run: Path, suffix: str, value: float) -> None:
    """R11: A published file whose weights hold NaN or infinity is refused, and the tensor is named."""
    from sdit.checkpoint.load import load_trained

    tensors = {name: torch.from_numpy(array.copy()) for name, array in load_file(exported(run)).items()}
    tensors["blocks.0.attn.qkv.weight"].view(-1)[5] = value
    path = run / f"other{suffix}"
    if suffix == ".pt":
        torch.save({"ema": tensors}, path)
    else:
        save_file({name: tensor.numpy() for name, tensor in tensors.items()}, path)
    (run / "config.yaml").write_text(json.dumps(tiny_config().model_dump(mode="json")))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.qkv\.weight holds NaN or infinite"):
        load_trained(path, config=run / "config.yaml")


def test_an_export_that_would_overflow_is_refused(run: Path) -> None:
    """R11: float16 cannot hold 1e6: the export names the tensor and writes nothing."""
    from sdit.checkpoint.export import export_pickle, export_safetensors

    name = overwrite(checkpoint_of(run), "ema", 1e6)
    for export, out in ((export_safetensors, run / "half.safetensors"), (export_pickle, run / "half.pt")):
        with pytest.raises(CheckpointError, match=name.rpartition(".")[2]):
            export(run, out, "ema", torch.float16)
        assert not out.exists()


PUBLISHED: dict[str, Callable[[Path], object]] = {
    "FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
    "endless": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "header beyond the file": lambda path: path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:]),
    "deep header": lambda path: path.write_bytes(join('{"x":' + "[" * 50_000 + "]" * 50_000 + "}", b"")),
    "deep config": lambda path: change_facts(path, config="[" * 50_000 + "]" * 50_000),
    "config is a list": lambda path: change_facts(path, config="[1]"),
    "config is torn": lambda path: change_facts(path, config="{"),
    "config is not legal": lambda path: change_facts(path, config='{"model": {"depth": -1}}'),
    "clock": lambda path: change_facts(path, images_seen="many"),
    "long clock": lambda path: change_facts(path, steps="9" * 5000),
    "trailing bytes": lambda path: path.write_bytes(path.read_bytes() + b"more"),
}


def change_facts(path: Path, **facts: str) -> None:
    header, payload = split(path.read_bytes())
    header["__metadata__"] |= facts
    path.write_bytes(join(json.dumps(header), payload))


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_malformed_published_file_is_refused(run: Path, kind: str) -> None:
    """S8: A published safetensors file is checked before any of it is used."""
    from sdit.checkpoint.load import load_trained

    path = exported(run)
    PUBLISHED[kind](path)
    with pytest.raises(CheckpointError, match=path.name) as caught:
        load_trained(path)
    assert_one_line(caught.value)


def test_a_published_file_behind_a_link_is_read(run: Path) -> None:
    """S8: Download caches hold links to weights; only special files are refused."""
    from sdit.checkpoint.load import load_trained

    path = exported(run)
    (run / "link.safetensors").symlink_to(path)
    assert load_trained(run / "link.safetensors").clock.images_seen == IMAGES


def test_a_config_too_large_for_its_weights_takes_no_memory(run: Path) -> None:
    """S8: A manifest whose config asks for a larger model than the shards hold is refused before it is allocated."""
    from sdit.checkpoint.load import load_model

    def enlarge(body: dict[str, Any]) -> None:
        config = Config.model_validate(body["config"]).model_dump(mode="json")
        config["model"] |= {"width": 1 << 20, "heads": 2}
        body["config"] = config

    reseal(checkpoint_of(run), enlarge)
    with pytest.raises(CheckpointError, match="the model needs shape"):
        load_model(checkpoint_of(run))


@pytest.mark.usefixtures("unbounded")
def test_the_report_reads_no_fifo(run: Path, tmp_path: Path) -> None:
    """S8: A FIFO or deep JSON among a run's files is named in the report and does not hang it."""
    (run / "metrics.jsonl").write_text('{"images_seen": 4, "step": 1, "loss": 1.0}\n' + "[" * 50_000 + "\n")
    os.mkfifo(run / "environment.json")
    (run / "deepspeed.json").write_text("[" * 50_000)
    command = [sys.executable, str(ROOT / "launcher" / "report.py"), str(run), "--out", str(tmp_path / "report.html")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert result.returncode == ExitCode.DONE, result.stderr
    assert "environment.json: not a regular file" in (tmp_path / "report.html").read_text()


def test_old_checkpoints_are_still_read(run: Path) -> None:
    """S8: A manifest of an older version, with infinite numbers in its config and without later fields, is read."""

    def change(body: dict[str, Any]) -> None:
        body["config"]["train"]["spike_deviations"] = float("inf")
        body.pop("prior_columns")
        body["from_the_future"] = {"a": [1, 2.5, None]}

    reseal(checkpoint_of(run), change)
    assert find_checkpoint(run).folder == checkpoint_of(run) == list_checkpoints(run / "checkpoints")[0]
    assert np.isfinite(next(iter(load_file(checkpoint_of(run) / SHARD).values()))).all()
