"""Each backbone option against its plain form, in half precision and while sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdit.model import DiffusionTransformer, build_model, forward_with_guidance
from sdit.model.feed_forward import SwiGlu
from sdit.model.norm import HeadNorm, ModulatedNorm
from sdit.model.rope import RotaryEmbedding

Batch = tuple[Tensor, Tensor, Tensor]
MakeModel = Callable[..., DiffusionTransformer]
OPTIONS: dict[str, dict[str, Any]] = {
    "rms": {"norm": "rms"},
    "swiglu": {"ffn": "swiglu"},
    "rms heads": {"qk_norm": "rms"},
    "layer heads": {"qk_norm": "layer"},
    "rope": {"rope": True},
    "no positions": {"positions": "none"},
    "modern": {"norm": "rms", "ffn": "swiglu", "qk_norm": "rms", "rope": True, "positions": "none"},
}
WITH_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
VARIANTS = pytest.mark.parametrize("variant", ["dit", "dtr", "switch"])


def _randomise(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def _gradients(result: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.randn(result.shape, generator=torch.Generator().manual_seed(2), dtype=result.dtype)
    return [result, *torch.autograd.grad((result * weight).sum(), inputs)]


def _assert_equal(ours: list[Tensor], plain: list[Tensor]) -> None:
    """In float64: both round about 100 operations by 1e-16 of values of at most 100."""
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_modulated_rms_norm_is_its_formula() -> None:
    norm = ModulatedNorm(8, "rms").double()
    _randomise(norm)
    assert norm.weight is not None
    x, shift, scale = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5, 8), (3, 8), (3, 8))
    )
    rms = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    plain = rms * (1 + scale[:, None]) + shift[:, None]
    inputs = [x, shift, scale, norm.weight]
    _assert_equal(_gradients(norm(x, shift, scale), inputs), _gradients(plain, inputs))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_of_heads_are_their_formulas(kind: Any) -> None:
    norm = HeadNorm(6, kind).double()
    _randomise(norm)
    x = torch.randn(2, 5, 3, 6, dtype=torch.float64, requires_grad=True)
    if kind == "rms":
        plain = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    else:
        centred = x - x.mean(-1, keepdim=True)
        assert norm.bias is not None
        plain = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    inputs = [x, *norm.parameters()]
    _assert_equal(_gradients(norm(x), inputs), _gradients(plain, inputs))


def test_swiglu_is_its_formula() -> None:
    """Its product is one function that saves its input only."""
    mlp = SwiGlu(6, 5).double()
    _randomise(mlp)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    a, b = (x @ mlp.w12.weight.T + mlp.w12.bias).split(5, dim=-1)
    plain = (F.silu(a) * b) @ mlp.w3.weight.T + mlp.w3.bias
    inputs = [x, *mlp.parameters()]
    _assert_equal(_gradients(mlp(x), inputs), _gradients(plain, inputs))


def test_rope_turns_each_pair_by_its_angle() -> None:
    """As products of complex numbers: row angles in the first half of the channels, column angles in the second."""
    side, width = 3, 8
    rope = RotaryEmbedding(side**2, width)
    rope.fill(side, None)
    x = torch.randn(2, side**2, width, dtype=torch.float64)
    frequency = 10000.0 ** -(torch.arange(2, dtype=torch.float64) / 2)
    for token in range(side**2):
        angle = torch.cat([token // side * frequency, token % side * frequency])
        turned = torch.view_as_complex(x[:, token].unflatten(-1, (-1, 2))) * torch.polar(torch.ones(4).double(), angle)
        # The table is float32.
        torch.testing.assert_close(rope(x)[:, token], torch.view_as_real(turned).flatten(-2), rtol=0, atol=1e-6)


def test_scores_of_turned_heads_depend_on_the_difference_of_positions() -> None:
    """Queries and keys that are equal everywhere: the score of two tokens is that of any two at the same distance."""
    side = 4
    rope = RotaryEmbedding(side**2, 8)
    rope.fill(side, None)
    q, k = (rope(torch.randn(8).expand(side**2, 8)) for _ in range(2))
    score = (q @ k.T).view(side, side, side, side)
    torch.testing.assert_close(score[:-1, :-1, :-1, :-1], score[1:, 1:, 1:, 1:], rtol=1e-5, atol=1e-5)


@VARIANTS
@WITH_OPTIONS
def test_each_option_changes_the_function(
    make_model: MakeModel, batch: Batch, variant: str, options: dict[str, Any]
) -> None:
    plain, model = make_model(variant=variant), make_model(variant=variant, **options)
    model.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.allclose(model(*batch).prediction, plain(*batch).prediction, rtol=1e-3, atol=1e-3)


@VARIANTS
@WITH_OPTIONS
def test_training_and_evaluation_compute_the_same(
    make_model: MakeModel, batch: Batch, variant: str, options: dict[str, Any]
) -> None:
    model = make_model(variant=variant, **options)
    torch.testing.assert_close(model.eval()(*batch).prediction, model.train()(*batch).prediction, rtol=1e-5, atol=1e-5)


@VARIANTS
@WITH_OPTIONS
@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_bfloat16_rounds_and_does_not_change_the_function(
    make_model: MakeModel, batch: Batch, variant: str, options: dict[str, Any], way: str
) -> None:
    model = make_model(variant=variant, **options)
    exact = model(*batch).prediction
    if way == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(*batch).prediction
    else:
        for parameter in model.parameters():  # as DeepSpeed does; it keeps buffers in float32
            parameter.data = parameter.data.bfloat16()
        rounded = model(*batch).prediction
    rounded.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())
    roundings = 2 * 20 + 10  # in a row, by at most 2^-9 each: of two blocks, and before and after them
    assert (rounded - exact).norm() < roundings * 2**-9 * exact.norm()


@WITH_OPTIONS
def test_guided_sampling_is_the_mixture_of_both_predictions(
    make_model: MakeModel, batch: Batch, options: dict[str, Any]
) -> None:
    model, (x, _, y) = make_model(**options).eval(), batch
    with torch.no_grad():
        guided = forward_with_guidance(model, x, 7, y, 3.0)
        of_label, of_null = (model(x, 7, labels).prediction for labels in (y, torch.full_like(y, model.null_label)))
    expected = torch.cat([of_null[:, :3] + 3 * (of_label[:, :3] - of_null[:, :3]), of_label[:, 3:]], dim=1)
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)


def test_time_scale_is_the_factor_on_continuous_times(make_model: MakeModel, batch: Batch) -> None:
    """Tasks, and with them gates and whole times, keep their embedding."""
    x, t, y = batch
    plain, scaled = make_model(variant="dit"), make_model(variant="dit", time_scale=1)
    assert torch.equal(plain(x, t, y).prediction, scaled(x, t, y).prediction)
    continuous = (t + 0.25) / 50
    assert torch.equal(scaled(x, 50 * continuous, y).prediction, plain(x, continuous, y).prediction)
    switch = make_model(time_scale=1)
    assert torch.equal(switch(x, continuous, y).routing.task, t)
    assert torch.equal(switch.all_gate_probs(), make_model().all_gate_probs())


def test_a_position_base_scales_the_coordinates() -> None:
    """A grid of side 4 with base 2 has every second position, and angle, of the grid of side 2."""
    shape = {"variant": "dit", "depth": 1, "width": 16, "heads": 2, "channels": 3, "classes": 5, "rope": True}
    small, large = (build_model({**shape, "patch_size": 1, "input_size": side, "position_base": 2}) for side in (2, 4))
    for name in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
        every_second = large.get_buffer(name).view(4, 4, -1)[::2, ::2].reshape(4, -1)
        torch.testing.assert_close(every_second, small.get_buffer(name).view(4, -1))


def test_without_positions_and_rope_tokens_have_no_order(make_model: MakeModel, batch: Batch) -> None:
    model, (x, t, y) = make_model(positions="none"), batch
    assert "pos_embed" not in model.state_dict()
    swapped = x.view(6, 3, 2, 2, 2, 2).flip(2).reshape(x.shape)  # rows of patches
    expected = model(x, t, y).prediction.view(6, 6, 2, 2, 2, 2).flip(2).reshape(6, 6, 4, 4)
    torch.testing.assert_close(model(swapped, t, y).prediction, expected, rtol=1e-5, atol=1e-5)


def test_rope_tables_are_not_rounded_with_the_weights() -> None:
    model = build_model({"depth": 1, "width": 32, "heads": 2, "patch_size": 2, "input_size": 8, "rope": True})
    exact = [model.feat_rope.freqs_cos.clone(), model.feat_rope.freqs_sin.clone()]
    model.bfloat16()
    assert model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    for want, got in zip(exact, (model.feat_rope.freqs_cos, model.feat_rope.freqs_sin), strict=True):
        assert torch.equal(got, want)
    q = torch.randn(1, 2, 16, 16).bfloat16()
    assert model.feat_rope(q).dtype == torch.bfloat16
    assert torch.equal(model.feat_rope(q), model.feat_rope(q.float()).bfloat16())
    assert model.double().feat_rope.freqs_cos.dtype == torch.float64
