"""`--precision` and `train.matmul`: bf16 rounds the weights as training does, TF32 is allowed where it is asked for only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdit import cli
from sdit.checkpoint.load import Trained, load_trained
from sdit.cli import sample
from sdit.config import TrainConfig, load_config
from sdit.distributed.device import prepare_device
from sdit.errors import ConfigError, ExitCode
from sdit.evaluate.generate import Generator, check_precision, with_precision
from sdit.evaluate.sample_cache import SampleCache, SampleSet
from sdit.model import build_model
from sdit.model.embedding import float_linear
from sdit.model.precision import allow_tf32, tf32_products
from sdit.randomness import Purpose, normal_noise
from tests.unit.written_run import random_model, tiny_config, write_run

LABELS = np.array([0, 1, 2, 3, 4, 0, 1], dtype=np.int64)
ROUNDING = 2.0**-8  # of bf16, relative to a number


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, tiny_config("sample.sampler=ddpm"))
    return folder


@pytest.fixture(autouse=True)
def unchanged_settings() -> Iterator[None]:
    with tf32_products(torch.backends.cuda.matmul.allow_tf32):
        yield


def allowed() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def draw(trained: Trained, **more: Any) -> np.ndarray:
    return np.concatenate(list(Generator(trained, trained.config.sample, **more).images(LABELS)))


def test_fp32_changes_no_bit(run: Path) -> None:
    assert np.array_equal(draw(with_precision(load_trained(run), "fp32")), draw(load_trained(run)))


def test_bf16_rounds_the_weights_and_nothing_before_them(run: Path) -> None:
    exact, rounded = load_trained(run), with_precision(load_trained(run), "bf16")
    assert rounded.precision == "bf16" and exact.precision == "fp32"
    stored = dict(exact.model.named_parameters())
    for name, parameter in rounded.model.named_parameters():
        assert torch.equal(parameter, stored[name].bfloat16())
    for (name, buffer), (_, other) in zip(rounded.model.named_buffers(), exact.model.named_buffers(), strict=True):
        assert buffer.dtype == other.dtype and torch.equal(buffer, other), name
    task = torch.arange(exact.config.model.timesteps)
    assert rounded.model.t_embedder(task).dtype == torch.float32
    assert rounded.model.gate_probs(task).dtype == torch.float32


@pytest.mark.parametrize("variant", ["dit", "dtr", "switch"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_bf16_differs_from_fp32_by_its_rounding(tmp_path: Path, variant: str, kind: str) -> None:
    """Two blocks and three sampler steps of a model that predicts x0: a few roundings of each number."""
    write_run(tmp_path, tiny_config(f"model.variant={variant}", f"model.experts.kind={kind}"))
    exact, rounded = draw(load_trained(tmp_path)), draw(with_precision(load_trained(tmp_path), "bf16"))
    assert rounded.dtype == np.float32 and np.isfinite(rounded).all()
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 0 < error < 10 * ROUNDING


def test_bf16_images_do_not_depend_on_the_batch_but_for_rounding(run: Path) -> None:
    trained = with_precision(load_trained(run), "bf16")
    whole, single = draw(trained), draw(trained, batch=1)
    assert np.linalg.norm(whole - single) / np.linalg.norm(whole) < 10 * ROUNDING


def test_tf32_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"^--precision: tf32, but the device cpu computes no TF32; legal: fp32, bf16$"
    ):
        check_precision("tf32", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    with pytest.raises(ConfigError, match=r"^--precision: tf32, but Tesla V100 computes no TF32; legal: fp32, bf16$"):
        check_precision("tf32", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    check_precision("tf32", torch.device("cuda", 0))


def test_the_command_refuses_tf32_on_a_cpu_in_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sdit.distributed.comm.set_threads", lambda *_: 1)  # would outlast the test
    words = ["sample", "--checkpoint", str(run), "--raw", str(tmp_path / "raw.npy")]
    assert cli.run([*words, "--precision", "tf32"]) == ExitCode.CONFIG
    assert "--precision: tf32, but the device cpu computes no TF32" in capsys.readouterr().err
    assert cli.run([*words, "--precision", "bf16"]) == ExitCode.DONE
    rounded = np.load(tmp_path / "raw.npy")
    assert cli.run(words) == ExitCode.DONE
    exact = np.load(tmp_path / "raw.npy")
    assert 0 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 10 * ROUNDING


def test_the_default_is_fp32_and_other_words_are_refused() -> None:
    words = ["--checkpoint", "run", "--out", "grid.png"]
    assert sample.parse(words).precision == "fp32"
    with pytest.raises(SystemExit) as caught:
        sample.parse([*words, "--precision", "fp16"])
    assert caught.value.code == ExitCode.USAGE


def test_precision_names_a_cache_and_old_caches_are_of_fp32(run: Path, tmp_path: Path) -> None:
    trained = load_trained(run)
    folders = {}
    for precision in ("fp32", "tf32", "bf16"):
        samples = SampleSet(Generator(replace(trained, precision=precision), trained.config.sample), "ema", 7)
        cache = SampleCache(tmp_path, samples, 4)
        assert samples.facts["precision"] == precision == cache.facts["precision"]
        folders[precision] = cache.folder
    assert len(set(folders.values())) == 3
    unnamed = SampleSet(Generator(trained, trained.config.sample), "ema", 7)
    facts = {name: value for name, value in unnamed.facts.items() if name != "precision"}

    class OldSet(SampleSet):
        @property
        def facts(self) -> dict[str, Any]:
            return facts

    old = OldSet(unnamed.generator, "ema", 7)
    assert SampleCache(tmp_path, old, 4).folder == folders["fp32"]


@pytest.mark.parametrize(("precision", "is_allowed"), [("fp32", False), ("tf32", True), ("bf16", True)])
def test_tf32_is_allowed_in_model_calls_only(run: Path, precision: Any, is_allowed: bool) -> None:
    trained = replace(load_trained(run), precision=precision)
    seen, before = [], allowed()
    trained.model.x_embedder.register_forward_hook(lambda *_: seen.append(allowed()))
    for _ in Generator(trained, trained.config.sample, batch=3).images(LABELS):
        assert allowed() == before
    assert seen and set(seen) == {(is_allowed, is_allowed)}


@pytest.mark.parametrize("matmul", ["highest", "tf32"])
def test_training_allows_tf32_if_it_is_asked_for(matmul: Any) -> None:
    prepare_device("auto", TrainConfig(matmul=matmul))
    assert allowed() == (matmul == "tf32",) * 2


def test_time_embedding_and_gates_are_float32_under_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def linear(x: Tensor, *weights: Tensor) -> Tensor:
        seen.append(allowed()[0])
        return plain(x, *weights)

    plain = F.linear
    layer = nn.Linear(4, 3)
    allow_tf32(True)
    expected = layer(torch.ones(2, 4))
    monkeypatch.setattr(F, "linear", linear)
    assert torch.equal(float_linear(torch.ones(2, 4), layer.weight, layer.bias), expected)
    assert seen == [False] and allowed() == (True, True)


def test_tf32_changes_no_number_of_a_cpu() -> None:
    config = load_config(None, ["train.matmul=tf32"], {"train": {"steps": 1}}).train
    assert config.matmul == "tf32"
    model = random_model(tiny_config(), 1).train()
    found = []
    for matmul in ("highest", "tf32"):
        prepare_device("auto", TrainConfig(matmul=matmul))
        model.zero_grad()
        x = torch.from_numpy(normal_noise(0, range(3), (1, 4, 4), Purpose.NOISE))
        out = model(x, torch.tensor([1, 20, 40]), torch.tensor([0, 1, 2])).prediction
        out.square().sum().backward()
        found.append(
            [out.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]
        )
    assert len(found[0]) > 10 and all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_weights_are_rounded_as_deepspeed_rounds_them() -> None:
    """DeepSpeed casts the parameters of a bf16 run, and leaves the buffers."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    config = tiny_config("model.variant=dtr")
    ours, theirs = random_model(config, 1), build_model(config.model)
    theirs.load_state_dict(ours.state_dict())
    engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
    nn.Module.__init__(engine)
    engine.module = theirs
    engine._cast_module_mixed_precision(torch.bfloat16, None, False, None)
    trained = Trained(ours, config, None, Path("run"))  # type: ignore[arg-type]
    with_precision(trained, "bf16")
    cast = [*theirs.named_parameters(), *theirs.named_buffers()]
    for (name, found), (_, expected) in zip([*ours.named_parameters(), *ours.named_buffers()], cast, strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected), name
