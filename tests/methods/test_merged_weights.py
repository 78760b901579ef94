"""Merged into the weights, a change samples what it samples beside them; and the weights come out as they went in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from personalize_core.base_model.model import BaseModel
from personalize_core.methods import method_class
from personalize_core.methods.interface import Method
from personalize_core.methods.shared.merged_weights import merged
from tests.conftest import disturbed, equal_bits, predict, sample_latents, snapshot, tiny_base

PROMPTS = ["a photo of a <v> dog", "a red <v> dog on the beach", "the jungle"]
EVERYWHERE = ("proj_in", "proj_out", "to_k", "to_v")
CHOSEN: list[tuple[str, dict[str, Any]]] = [
    ("lora_dreambooth", {}),
    ("lora_dreambooth", {"targets": ("attention", "feed_forward", "projections", "text_encoder")}),
    ("oft", {}),
    ("oft", {"rescaled": True}),
    ("oft", {"block_share": True}),
    ("personalized_residuals", {}),
    ("personalized_residuals", {"targets": EVERYWHERE, "train_embedding": True}),
]


@contextmanager
def attached_beside(method: Method, base: BaseModel) -> Iterator[None]:
    """With the changes beside the weights, as in training; otherwise as it samples."""
    with type(method).attach(method.train(), base):
        method.eval()
        yield


def learned(name: str, chosen: dict[str, Any], base: BaseModel, concept) -> Method:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        method = disturbed(method_class(name)(method_class(name).Config(**chosen), base, concept))
    return method.eval().requires_grad_(False)


@pytest.mark.parametrize(("name", "chosen"), CHOSEN, ids=str)
def test_images_are_those_of_the_changes_beside_the_weights(name, chosen, base, concept, monkeypatch):
    method = learned(name, chosen, base, concept)
    plain, found = predict(base, base.encode(PROMPTS, concept)), {}
    sampled = sample_latents(method, base, PROMPTS)
    with method.attach(base):
        hooks = [hook for module in base.unet.modules() for hook in module._forward_hooks.values()]
        found["merged"] = predict(base, base.encode(PROMPTS, concept))
    with attached_beside(method, base):
        found["beside"] = predict(base, base.encode(PROMPTS, concept))
    assert hooks == []  # nothing is computed beside the weights
    torch.testing.assert_close(found["merged"], found["beside"], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found["merged"], plain, atol=1e-2)
    monkeypatch.setattr(method, "attach", lambda base: attached_beside(method, base))
    beside = sample_latents(method, base, PROMPTS)
    assert (sampled - beside).abs().max() <= 1e-5 * beside.abs().max()


@pytest.mark.parametrize(("name", "chosen"), CHOSEN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weights_come_out_as_they_went_in_though_the_block_fails(name, chosen, dtype, concept):
    base = tiny_base(dtype=dtype)
    method, before = learned(name, chosen, base, concept), snapshot(base)
    parameters = dict(base.unet.named_parameters())
    with pytest.raises(InterruptedError), method.attach(base):
        assert any(weight is not parameters[path] for path, weight in base.unet.named_parameters())
        raise InterruptedError
    assert all(weight is parameters[path] for path, weight in base.unet.named_parameters())
    assert equal_bits(snapshot(base), before)


def test_under_lag_and_in_training_the_changes_stay_beside_the_weights(concept):
    base = tiny_base()
    weights = dict(base.unet.named_parameters())
    for name in ("lora_dreambooth", "oft", "personalized_residuals"):
        method = learned(name, {}, base, concept)
        for training, lag in ((True, False), (False, True)):
            method.train(training).sampling = method.config.Sampling(lag=lag)
            with method.attach(base):
                assert all(base.unet.get_parameter(path) is weight for path, weight in weights.items()), name


def test_a_rotation_is_merged_as_a_matrix(concept):
    """diag(s) W R^T with R as one block-diagonal matrix, in float64."""
    base = tiny_base()
    method: Any = learned("oft", {"rescaled": True}, base, concept)
    path, rotation = next(iter(method.rotations.by_path()))
    weight = base.unet.get_parameter(f"{path}.weight").double()
    R = torch.block_diag(*rotation.blocks().double())
    expected = torch.diag(rotation.log_scale.double().exp()) @ weight @ R.T
    torch.testing.assert_close(rotation.merged(weight.float()).double(), expected, atol=1e-5, rtol=1e-5)


def test_in_bfloat16_a_change_smaller_than_a_rounded_weights_last_digit_is_not_lost():
    """Merged into the rounded weights, a change of a thousandth would leave all as they are."""
    base = tiny_base(dtype=torch.bfloat16)
    path = f"{base.layers[0]}.transformer_blocks.0.attn2.to_q"
    layer = base.unet.get_submodule(path)
    rounded: Any = layer.weight
    assert torch.equal((rounded.float() * 1.001).bfloat16(), rounded)
    with merged(base, {path: lambda W: W * 1.001}):
        inside: Any = layer.weight
        assert inside.dtype == torch.bfloat16
        share = (inside.float() / rounded.float() - 1).mean().item()
        assert share == pytest.approx(1e-3, rel=0.5)
        x = torch.randn(3, inside.shape[1], dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
        assert torch.equal(layer(x), F.linear(x, inside))
    assert layer.weight is rounded
