"""Laws of the micro-batches that a loader's threads make: those of drawing in the training thread, copied in order."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sdit.config import DataConfig, ModelConfig
from sdit.data.loader import Loader, build_loader
from sdit.diffusion import draw_label_drop
from sdit.errors import DataError
from sdit.randomness import Purpose, normal_noise
from sdit.time_law import TimeLaw
from sdit.topology import plan_batch
from sdit.train.batches import BatchDraws, BatchStream, micro_batches, rank_requests
from sdit.train.context import TrainContext
from sdit.transfers import PendingUpload, UploadStream

SEED, GLOBAL_BATCH, CLASSES, DROP = 3, 12, 10, 0.3
MODEL = ModelConfig(input_size=8, patch_size=2, channels=1, classes=CLASSES)
CPU = torch.device("cpu")


def open_loader(**data: Any) -> Loader:
    return build_loader(DataConfig(flip=True, **data), MODEL, SEED)


@pytest.mark.parametrize("timesteps", [1000, None])
@pytest.mark.parametrize(("workers", "prefetch", "ranks", "micro_batch"), [(1, 1, 1, 12), (3, 1, 2, 3), (2, 4, 1, 4)])
def test_the_threads_draw_what_the_training_thread_would_draw(
    timesteps: int | None, workers: int, prefetch: int, ranks: int, micro_batch: int
) -> None:
    def times(first: int) -> np.ndarray:
        return TimeLaw("stratified").draw(SEED, first, GLOBAL_BATCH, timesteps)

    plan = plan_batch(GLOBAL_BATCH, micro_batch, ranks)
    firsts = range(100, 100 + 20 * GLOBAL_BATCH, GLOBAL_BATCH)  # more steps than times are kept for
    with open_loader(workers=workers, prefetch_batches=prefetch) as loader:
        for rank in range(ranks):
            asked = list(rank_requests(plan, firsts, rank, ranks))
            draws = BatchDraws(SEED, times, CLASSES, DROP)
            made = list(micro_batches(loader, draws, CPU, iter(asked)))
            assert len(made) == len(asked) == len(firsts) * plan.accumulation
            for request, micro_batch_ in zip(asked, made, strict=True):
                batch, samples = micro_batch_.on_device(), loader.read(request.indices)
                step_times = times(request.first_sample)
                dropped = draw_label_drop(SEED, request.indices, DROP)
                expected = (
                    request.indices, samples.x0,
                    normal_noise(SEED, request.indices, samples.x0.shape[1:], Purpose.NOISE),
                    step_times[request.indices - request.first_sample], np.where(dropped, CLASSES, samples.y),
                )  # fmt: skip
                found = (batch.index, batch.x0, batch.noise, batch.t, batch.y)
                for tensor, array in zip(found, expected, strict=True):
                    assert tensor.numpy().dtype == array.dtype and tensor.numpy().tobytes() == array.tobytes()
                assert np.array_equal(micro_batch_.times, step_times)


def test_the_times_of_a_step_are_drawn_once_for_the_loader_and_the_planner() -> None:
    drawn: list[int] = []

    def draw(seed: int, first: int, global_batch: int) -> np.ndarray:
        drawn.append(first)
        return TimeLaw().draw(seed, first, global_batch, 1000)

    parts: dict[str, Any] = dict.fromkeys(field.name for field in fields(TrainContext))
    sections = {"model": SimpleNamespace(classes=CLASSES), "diffusion": SimpleNamespace(label_drop=DROP)}
    parts["run"] = SimpleNamespace(
        config=SimpleNamespace(seed=SEED, **sections), batch=SimpleNamespace(global_batch=GLOBAL_BATCH)
    )
    parts["state"] = SimpleNamespace(clock=SimpleNamespace(steps=0))
    context = TrainContext(**{**parts, "objective": SimpleNamespace(draw_timesteps=draw)})
    stream, firsts = BatchStream(context), range(0, 3 * GLOBAL_BATCH, GLOBAL_BATCH)
    for first in firsts:
        loaded, planned = stream._draws.times(first), context.times_of(first)
        assert loaded is planned and np.array_equal(planned, TimeLaw().draw(SEED, first, GLOBAL_BATCH, 1000))
    assert drawn == list(firsts)


def test_labels_are_kept_without_label_drop() -> None:
    y = np.arange(10)
    assert BatchDraws(SEED, np.arange, CLASSES, 0.0).labels(y, y) is y
    assert BatchDraws(SEED, np.arange, 0, 1.0).labels(y, y) is y


def test_an_error_while_drawing_is_raised_in_the_training_thread() -> None:
    def times(first: int) -> np.ndarray:
        raise DataError("no times")

    plan = plan_batch(GLOBAL_BATCH, None, 1)
    with open_loader() as loader, pytest.raises(DataError, match="no times"):
        next(micro_batches(loader, BatchDraws(SEED, times, CLASSES, DROP), CPU, rank_requests(plan, [0], 0, 1)))


class FakeTensor:
    """Host memory that records what an upload does to it."""

    device = CPU

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def pin_memory(self) -> FakeTensor:
        self._log.append("pin")
        return self

    def to(self, device: torch.device, non_blocking: bool) -> FakeTensor:
        assert device.type == "cuda" and non_blocking
        self._log.append("copy")
        return self

    def record_stream(self, stream: Any) -> None:
        self._log.append(f"keep for {stream.name}")


class FakeStream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def record_event(self) -> str:
        self._log.append(f"event in {self.name}")
        return "copied"

    def wait_event(self, event: Any) -> None:
        self._log.append(f"{self.name} waits for {event}")


def test_on_a_gpu_the_training_stream_waits_for_the_copy_and_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    copies, training = FakeStream("copies", log), FakeStream("training", log)

    @contextmanager
    def stream(chosen: FakeStream) -> Any:
        log.append(f"enter {chosen.name}")
        yield
        log.append(f"leave {chosen.name}")

    fake = SimpleNamespace(
        Stream=lambda device: copies, stream=stream, current_stream=lambda: training,
        set_device=lambda device: log.append(f"thread on {device}"),
    )  # fmt: skip
    monkeypatch.setattr("sdit.transfers.torch.cuda", fake)
    monkeypatch.setattr("sdit.transfers.torch.from_numpy", lambda array: FakeTensor(log))
    upload = UploadStream(torch.device("cuda", 1)).begin((np.zeros(1), np.zeros(1)))
    made = ["thread on cuda:1", "enter copies", "pin", "copy", "pin", "copy", "event in copies", "leave copies"]
    assert log == made
    assert len(upload.wait()) == 2
    assert log[len(made) :] == ["training waits for copied", "keep for training", "keep for training"]


def test_on_a_cpu_nothing_is_copied_or_waited_for() -> None:
    array = np.arange(3)
    upload = UploadStream(CPU).begin((array,))
    assert upload == PendingUpload(upload.tensors, None)
    assert upload.wait()[0].data_ptr() == array.ctypes.data
