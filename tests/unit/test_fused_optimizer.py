"""AdamW in one kernel, as on GPUs: its step count is on the device, and its update equals the plain one."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from sdit.config import OptimizerConfig
from sdit.distributed.deepspeed_internals import create_moments, set_optimizer_steps
from sdit.train.optimizer import make_optimizer


def stepped(fused: bool) -> torch.Tensor:
    """A parameter after two steps of an optimizer whose moments are created and whose count is set before the first."""
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 64))
    groups = [{"params": [parameter], "role": "model", "kind": "adamw"}]
    optimizer = make_optimizer(groups, OptimizerConfig(weight_decay=0.1, learning_rate=0.1), fused)
    engine = SimpleNamespace(basic_optimizer=optimizer)
    create_moments(engine)
    set_optimizer_steps(engine, 10)
    for scale in (1.0, -2.0):
        parameter.grad = scale * torch.linspace(1, 3, 64)
        optimizer.step()
    assert optimizer.state[parameter]["step"].item() == 12
    return parameter.detach()


def test_fused_update_equals_the_plain_one() -> None:
    # Both are float32 with the same formula: two steps differ by a few roundings of values up to 1.
    torch.testing.assert_close(stepped(fused=True), stepped(fused=False), rtol=0, atol=4 * 2**-24)


def test_step_count_of_a_fused_optimizer_is_on_the_device() -> None:
    parameter = torch.nn.Parameter(torch.empty(4, device="meta"))
    optimizer = make_optimizer([{"params": [parameter], "role": "model", "kind": "adamw"}], OptimizerConfig())
    for fused, device in ((None, "cpu"), (True, "meta")):
        optimizer.state.clear()
        optimizer.param_groups[0]["fused"] = fused
        create_moments(SimpleNamespace(basic_optimizer=optimizer))
        assert optimizer.state[parameter]["step"].device.type == device
