"""Compiled transformer blocks compute what they compute otherwise, whatever is attached to them at the moment."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from personalize_core.base_model import compiler, compiling
from personalize_core.base_model.attention import AttentionMaps
from personalize_core.base_model.compiler import check_compiler
from personalize_core.base_model.compiling import CompiledBlocks
from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.model import BaseModel
from personalize_core.errors import InputError
from personalize_core.methods.shared.layer_modules import computing
from personalize_core.methods.shared.tuned_weights import TunedWeights, parameter_names
from tests.conftest import LAYERS, disturbed, predict, snapshot


class Counting:
    """A backend that runs what was traced as it is, and counts how often something was."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable:
        self.compiled += 1
        return graph.forward


@pytest.fixture
def backend() -> Counting:
    return Counting()


@pytest.fixture
def base(base) -> BaseModel:
    base.compiles = True
    return base


@pytest.fixture
def context(base):
    return base.encode(["a photo of a dog", "a red mug"])


def blocks(base: BaseModel) -> list[Any]:
    return [transformer.transformer_blocks[0] for transformer in base.transformers.values()]


def adding(change: nn.Module) -> Callable:
    return lambda layer, args, output: output + change(args[0])


def linear(layer: nn.Linear) -> nn.Linear:
    return nn.Linear(layer.in_features, layer.out_features).requires_grad_(False)


def test_only_who_asked_for_it_is_compiled(base, context, backend):
    base.compiles = False
    with base.compiled(backend):
        predict(base, context)
    assert backend.compiled == 0


def test_every_block_is_compiled_once_and_says_the_same(base, context, backend):
    expected = predict(base, context)
    for _ in range(2):
        with base.compiled(backend):
            assert torch.equal(predict(base, context), expected)
    assert backend.compiled == len(LAYERS)


def test_outside_nothing_is_left_of_it(base, context, backend):
    before, setting = snapshot(base), torch._dynamo.config.skip_nnmodule_hook_guards
    with pytest.raises(KeyError), base.compiled(backend):
        predict(base, context)
        assert all("forward" in vars(block) for block in blocks(base))
        raise KeyError
    assert not any("forward" in vars(block) for block in blocks(base))
    assert torch._dynamo.config.skip_nnmodule_hook_guards == setting
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(base).items())


def test_what_is_attached_acts_as_long_as_it_is_attached_and_no_longer(base, context, backend):
    """Torch's own default trusts that hooks never change: the first ones would act on, and later ones never."""
    query = blocks(base)[1].attn1.to_q
    plain = predict(base, context)
    changes = [linear(query), linear(query)]
    with base.compiled(backend):
        for change in (*changes, changes[0]):
            assert torch.equal(predict(base, context), plain)
            with hooked(query.register_forward_hook(adding(change))):
                personal = predict(base, context)
            with computing({query: lambda x, query=query: 2 * nn.functional.linear(x, query.weight, query.bias)}):
                doubled = predict(base, context)
            assert torch.equal(predict(base, context), plain)
            assert not torch.equal(personal, plain) and not torch.equal(doubled, plain)
            with hooked(query.register_forward_hook(adding(change))):
                assert torch.equal(personal, predict(base, context))
    with hooked(query.register_forward_hook(adding(changes[0]))):
        assert torch.equal(predict(base, context), personal)


def test_what_is_attached_again_is_not_compiled_again(base, context, backend):
    """A training with probes attaches and detaches over and over."""
    query = blocks(base)[0].attn2.to_q
    with base.compiled(backend):
        for _ in range(10):
            with hooked(query.register_forward_hook(adding(linear(query)))):
                predict(base, context)
            predict(base, context)
    assert backend.compiled == len(LAYERS) + 1


def test_other_weights_are_computed_with_while_they_are_there(base, context, backend):
    tuned = TunedWeights(base.unet, parameter_names(base.unet))
    plain = predict(base, context)
    with base.compiled(backend):
        for seed in range(2):
            disturbed(tuned, seed=seed)
            assert torch.equal(predict(base, context), plain)
            with tuned.placed_in(base.unet):
                personal = predict(base, context)
            assert not torch.equal(personal, plain)
    with tuned.placed_in(base.unet):
        assert torch.equal(predict(base, context), personal)


def test_attention_maps_are_the_same(base, context, backend):
    x_t, t = torch.randn(2, *base.latent_shape), torch.tensor([10, 900])
    expected, maps = AttentionMaps(), AttentionMaps()
    with torch.no_grad():
        base.denoise(x_t, t, context, expected)
        with base.compiled(backend):
            base.denoise(x_t, t, context, maps)
    assert list(maps) == list(expected) == list(LAYERS)
    for layer in LAYERS:
        assert torch.equal(maps[layer], expected[layer])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_gradients_are_the_same_also_where_blocks_are_computed_again(base, context, backend):
    x_t, t = torch.randn(2, *base.latent_shape), torch.tensor([10, 900])

    def gradient() -> Tensor:
        text = context.hidden.clone().requires_grad_(True)
        context_of_text = type(context)(**{**vars(context), "hidden": text})
        maps = AttentionMaps()
        (base.denoise(x_t, t, context_of_text, maps).pow(2).mean() + maps[LAYERS[1]].pow(2).mean()).backward()
        assert text.grad is not None
        return text.grad

    expected = gradient()
    with base.compiled(backend):
        torch.testing.assert_close(gradient(), expected, atol=1e-7, rtol=1e-5)
        with base.recomputing():
            torch.testing.assert_close(gradient(), expected, atol=1e-7, rtol=1e-5)


def test_too_many_variants_are_said_and_then_not_compiled(base, backend, monkeypatch, caplog):
    """Until the next time, which begins anew."""
    monkeypatch.setattr(compiling, "MOST_VARIANTS", 2)
    contexts = [base.encode(["a photo of a dog"] * rows) for rows in (1, 2, 3)]
    expected = [predict(base, context) for context in contexts]
    with base.compiled(backend):
        for context, same in [*zip(contexts, expected, strict=True)] * 2:
            assert torch.equal(predict(base, context), same)
    assert backend.compiled == 2 * len(LAYERS)
    assert [record.getMessage().split()[0] for record in caplog.records if record.name == compiling.__name__] == [
        *LAYERS
    ]
    with base.compiled(backend):
        assert torch.equal(predict(base, contexts[2]), expected[2])
    assert backend.compiled == 3 * len(LAYERS)


def test_torch_makes_code_of_its_own_for_a_block(base, context):
    """With the backend of params.yaml; a CPU's, which is what tests have."""
    try:
        check_compiler("cpu")
    except InputError as error:
        pytest.skip(str(error))
    expected = predict(base, context)
    with CompiledBlocks({LAYERS[0]: blocks(base)[0]}, "inductor").in_place():
        torch.testing.assert_close(predict(base, context), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("lacking", "device", "sentence"),
    [("compiler", "cpu", "C\\+\\+ compiler"), ("headers", "cpu", "Python.h"), ("triton", "cuda", "triton")],
)
def test_what_is_missing_for_it_is_named(lacking, device, sentence, monkeypatch, tmp_path):
    (tmp_path / "Python.h").touch()
    (tmp_path / "nowhere").mkdir()
    headers = tmp_path / "nowhere" if lacking == "headers" else tmp_path
    monkeypatch.setenv("CXX", "no-such-compiler" if lacking == "compiler" else "sh")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(headers))
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"{sentence}.*`compile: false`"):
        check_compiler(device)
    if device == "cuda":
        check_compiler("cpu")  # which does without
