"""AdamW with its state in 8 bits learns nearly what AdamW learns, and resumes to the bit."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from personalize_core.errors import InputError
from personalize_core.methods.dreambooth.method import DreamBooth
from personalize_core.methods.dreambooth.recipe import Config
from personalize_core.training import optimizers
from personalize_core.training.checkpoints import Checkpoints
from personalize_core.training.loop import train
from personalize_core.training.optimizers import OptimizerName, check_optimizer, make_optimizer
from tests.conftest import EVERY_STEP, equal_bits, tiny_base


class StandIn(torch.optim.Optimizer):
    """In the place of bitsandbytes' AdamW8bit, where that is not installed: its interface and the form of its state.

    Steps are counted in Python, all states share a table, and `state_dict` puts tensors into a dictionary inside.
    """

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})
        self.table = torch.linspace(-1, 1, 256)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state |= {"step": 0, "state1": torch.zeros_like(weight, dtype=torch.uint8), "qmap1": self.table}
                state["step"] += 1
                state["state1"] += weight.grad > 0
                weight -= group["lr"] * weight.grad.sign() / (range(99)[state["step"]] + state["state1"])

    def state_dict(self):
        saved = super().state_dict()
        saved["state"] = {
            index: {"step": state["step"], "inside": {key: state[key] for key in ("state1", "qmap1")}}
            for index, state in saved["state"].items()
        }
        return saved


@pytest.fixture(params=["stand-in", "bitsandbytes"])
def package(request, monkeypatch) -> None:
    if request.param == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
        return
    module: Any = ModuleType("bitsandbytes.optim")
    module.AdamW8bit = StandIn
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    monkeypatch.setattr(optimizers, "find_spec", lambda name: object())


@pytest.fixture
def make(concept):
    base = tiny_base()
    config = Config(steps=4, batch_size=2, lr=1e-3)
    return base, lambda: DreamBooth(config, base, concept)


def test_without_its_package_it_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    check_optimizer("adamw")
    with pytest.raises(InputError, match="pip install --constraint constraints.txt bitsandbytes`"):
        check_optimizer("adamw8bit")


def test_adamw_is_the_papers_whatever_the_strides_of_a_tensor():
    """Loshchilov & Hutter 2019, algorithm 2. Some weights are columns of a larger matrix, or a transpose."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(5, 3, generator=generator), torch.randn(3, 5, generator=generator).mT, torch.randn(())]
    weights = [torch.nn.Parameter(start.clone()) for start in starts]
    factors = [torch.randn(start.shape, generator=generator) for start in starts]
    optimizer = make_optimizer("adamw", [{"params": weights, "lr": 0.1}])
    expected = [start.double() for start in starts]
    moments = [(torch.zeros_like(one), torch.zeros_like(one)) for one in expected]
    for step in range(1, 5):
        optimizer.zero_grad()
        torch.stack(
            [(step * factor * weight).sum() for factor, weight in zip(factors, weights, strict=True)]
        ).sum().backward()
        optimizer.step()
        for i, factor in enumerate(factors):
            gradient, (m, v) = step * factor.double(), moments[i]
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            moments[i] = m, v
            change = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            expected[i] = expected[i] - 0.1 * 0.01 * expected[i] - 0.1 * change
    for weight, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach().double(), value, atol=1e-5, rtol=1e-5)


def test_both_take_the_same_settings_and_one_keeps_its_state_in_bytes():
    pytest.importorskip("bitsandbytes")
    large, small = torch.nn.Parameter(torch.ones(64, 64)), torch.nn.Parameter(torch.ones(10))
    groups = [{"params": [large, small], "lr": 0.1}]
    cases: list[tuple[OptimizerName, int]] = [("adamw", 8 * 4096), ("adamw8bit", 2 * 4096)]
    for name, bytes_of_large in cases:
        optimizer = make_optimizer(name, [dict(group) for group in groups])
        (group,) = optimizer.param_groups
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.1, (0.9, 0.999), 1e-8, 0.01)
        large.grad, small.grad = torch.full_like(large, 0.3), torch.full_like(small, 0.3)
        optimizer.step()
        held = [x for x in optimizer.state[large].values() if isinstance(x, torch.Tensor) and x.shape == large.shape]
        assert sum(x.numel() * x.element_size() for x in held) == bytes_of_large
    # twice: decay by 0.1 * 0.01, and a step of 0.1 against the gradient (Loshchilov & Hutter 2019)
    expected = (1 - 0.001) * ((1 - 0.001) * 1 - 0.1) - 0.1
    for weight in (large, small):
        torch.testing.assert_close(weight.detach(), torch.full_like(weight, expected), atol=2e-3, rtol=0)


def test_it_learns_nearly_what_adamw_learns(make, images):
    pytest.importorskip("bitsandbytes")
    base, method = make
    start, changes = torch.cat([weight.flatten() for weight in method().parameters()]).detach(), []
    names: list[OptimizerName] = ["adamw", "adamw8bit"]
    for name in names:
        learner = method()
        train(learner, base, images, seed=0, optimizer_name=name)
        changes.append(torch.cat([weight.flatten() for weight in learner.parameters()]) - start)
    assert not torch.equal(*changes)
    assert torch.cosine_similarity(*changes, dim=0) > 0.9
    assert changes[1].norm().item() == pytest.approx(changes[0].norm().item(), rel=0.1)


def test_it_resumes_to_the_same_bits(package, make, images, tmp_path):
    base, method = make
    undisturbed, resumed, checkpoints = method(), method(), Checkpoints(tmp_path, "this run", **EVERY_STEP)
    expected = train(undisturbed, base, images, seed=0, optimizer_name="adamw8bit")

    def stop(row):
        if row["step"] == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(method(), base, images, 0, stop, checkpoints, optimizer_name="adamw8bit")
    assert train(resumed, base, images, 0, checkpoints=checkpoints, optimizer_name="adamw8bit") == expected
    assert equal_bits(resumed.state_dict(), undisturbed.state_dict())
