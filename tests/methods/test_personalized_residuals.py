"""Personalized Residuals are low-rank changes to projections; LAG keeps them to the concept's region."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from personalize_core.base_model.hooks import hooked
from personalize_core.base_model.text import TextContext
from personalize_core.methods.personalized_residuals import method as residuals
from personalize_core.methods.personalized_residuals.method import Config, PersonalizedResiduals, Residual
from personalize_core.methods.shared import lag
from personalize_core.methods.shared.options import LAG
from personalize_core.training.loop import denoising_step, diffusion_loss, train
from tests.conftest import LAYERS, disturbed, predict, tiny_base

PROMPT = "a photo of a <v> dog"


@pytest.fixture
def method(base, concept) -> Any:
    return PersonalizedResiduals(Config(steps=3), base, concept).eval()


@pytest.fixture
def trained(method) -> Any:
    return disturbed(method)


def guided_context(base, concept, prompts=(PROMPT, "a dog on a <v> dog")) -> TextContext:
    return TextContext.guidance(base.encode([""] * len(prompts), concept), base.encode(prompts, concept))


# -- the residuals ---------------------------------------------------------------------------------------------


def test_before_training_not_one_bit_of_the_output_changes(method, base, concept):
    context = base.encode([PROMPT], concept)
    expected = predict(base, context)
    with method.attach(base):
        assert torch.equal(predict(base, context), expected)


def test_the_literal_reading_of_the_paper_starts_beside_the_base_model(base, concept):
    method = PersonalizedResiduals(Config(initial="gaussian"), base, concept)
    context = base.encode([PROMPT], concept)
    expected = predict(base, context)
    with method.attach(base):
        assert not torch.equal(predict(base, context), expected)


def test_factors_start_with_a_deviation_of_two_hundredths():
    """docs/methods.md#personalized-residuals."""
    torch.manual_seed(0)
    residual = Residual(1280, 1280, 64, "gaussian")
    for factor in (residual.A, residual.B):
        assert abs(factor.mean()) < 5e-4 and abs(factor.std() - 0.02) < 5e-4
    assert not Residual(1280, 1280, 64, "base_model").B.any()


def test_they_sit_on_the_output_projection_of_every_block(method):
    assert [name.replace("/", ".") for name in method.residuals] == [f"{layer}.proj_out" for layer in LAYERS]


def test_the_rank_is_a_share_of_the_channels_and_at_least_one(base, concept):
    for fraction, ranks in ((0.05, {16: 1, 32: 2}), (0.5, {16: 8, 32: 16})):
        residuals = PersonalizedResiduals(Config(rank_fraction=fraction), base, concept).residuals
        shapes = {tuple(residual.A.shape) for residual in residuals.values()}  # type: ignore[union-attr]
        assert shapes == set(ranks.items())


def test_a_residual_is_a_b_x_for_both_kinds_of_projection():
    residual = disturbed(Residual(6, 6, 2, "gaussian"))
    x = torch.randn(3, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    product = residual.A.detach().double().numpy() @ residual.B.detach().double().numpy()
    expected = np.einsum("om,bmhw->bohw", product, x.double().numpy())
    with torch.no_grad():
        convolutional = residual(x)
        linear = residual(x.flatten(2).transpose(1, 2))
    np.testing.assert_allclose(convolutional.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(linear.transpose(1, 2).unflatten(2, (4, 5)).numpy(), expected, atol=1e-5)


def merge(method, base) -> None:
    """W' = W + A B, written into the base model's own weights."""
    for path, residual in method.residuals.items():
        weight = base.unet.get_submodule(path.replace("/", ".")).weight
        with torch.no_grad():
            weight += (residual.A @ residual.B).view_as(weight)


ABLATIONS = [("proj_out",), ("proj_in",), ("to_k", "to_v"), ("to_k", "to_v", "proj_in", "proj_out")]


@pytest.mark.parametrize("targets", ABLATIONS, ids="+".join)
def test_attached_they_predict_as_merged_weights_do(targets, base, concept):
    trained = disturbed(PersonalizedResiduals(Config(targets=targets), base, concept)).eval()
    assert len(trained.residuals) == len(LAYERS) * len(targets)
    context = base.encode([PROMPT, "the desert"], concept)
    with trained.attach(base):
        attached = predict(base, context)
    merge(trained, base)
    torch.testing.assert_close(predict(base, context), attached, atol=1e-5, rtol=0)


def as_linear(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A U-Net's weights with its 1x1 projections as matrices."""
    return {
        name: t.flatten(1) if name.endswith(("proj_in.weight", "proj_out.weight")) else t for name, t in state.items()
    }


@pytest.mark.parametrize("sampling", [LAG(), LAG(lag=True)], ids=["plain", "LAG"])
def test_both_kinds_of_projection_agree_on_the_same_numbers(sampling, concept):
    convolutional, linear = tiny_base(False), tiny_base(True)
    linear.unet.load_state_dict(as_linear(convolutional.unet.state_dict()))
    method: Any = disturbed(PersonalizedResiduals(Config(), convolutional, concept)).eval()
    method.sampling = sampling
    answers = []
    for base in (convolutional, linear):
        with method.attach(base):
            answers.append(predict(base, guided_context(base, concept)))
    torch.testing.assert_close(answers[1], answers[0], atol=1e-5, rtol=0)


def test_without_lag_they_act_on_every_prompt(trained, base, concept):
    context = base.encode(["a photo of the desert"], concept)
    expected = predict(base, context)
    with trained.attach(base):
        assert not torch.equal(predict(base, context), expected)


def test_the_placeholder_and_the_text_are_not_trained(method, base, images):
    step = denoising_step(method.train(), base, images, method.stages()[0], seed=0, index=0)
    assert not step.context.hidden.requires_grad
    assert step.batch.prompts == [PROMPT] * 4


def test_without_the_macro_class_prompts_say_the_placeholder_alone(base, concept, images):
    method: Any = PersonalizedResiduals(Config(macro_class=False), base, concept)
    step = denoising_step(method.train(), base, images, method.stages()[0], seed=0, index=0)
    assert step.batch.prompts == ["a photo of a <v>"] * 4


def test_with_regularization_images_two_means_are_added(base, concept, images):
    method: Any = PersonalizedResiduals(Config(class_images=3, prior_weight=0.5, batch_size=2), base, concept)
    assert method.config.class_images_needed == 3
    step = denoising_step(method.train(), base, images, method.stages()[0], seed=0, index=0)
    assert step.batch.prompts == [PROMPT] * 2 + ["a photo of a dog"] * 2
    errors = (step.prediction - step.target).detach().double().numpy() ** 2
    expected = errors[:2].mean() + 0.5 * errors[2:].mean()
    assert float(diffusion_loss(step)) == pytest.approx(expected, rel=1e-5)


def test_the_embedding_moves_only_where_it_is_to_be_learned(base, concept, images):
    rare = base.rare_embedding()
    learner: Any = PersonalizedResiduals(Config(steps=2, train_embedding=True), base, concept)
    assert torch.equal(learner.embedding.vector, rare)
    train(learner, base, images, seed=0)
    assert not torch.equal(learner.embedding.vector, rare)
    assert "embedding.vector" not in PersonalizedResiduals(Config(), base, concept).state_dict()


@pytest.mark.parametrize("targets", [(), ("proj_out", "proj_out"), ("conv_in",)])
def test_targets_that_make_no_sense_are_refused(targets):
    with pytest.raises(ValidationError):
        Config(targets=targets)


def test_training_ignores_how_it_will_be_sampled(base, concept, images):
    learned = []
    for sampling in (LAG(), LAG(lag=True)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            method: Any = PersonalizedResiduals(Config(steps=2), base, concept)
        method.sampling = sampling
        train(method, base, images, seed=0)
        learned.append(method.state_dict())
    assert all(torch.equal(tensor, learned[1][name]) for name, tensor in learned[0].items())


def test_the_recipe_is_the_papers():
    """Sec. 4.1: rank 0.05 m, batch 4, 1e-3, 150 steps."""
    c = Config()
    assert (c.rank_fraction, c.batch_size, c.lr, c.steps, c.initial) == (0.05, 4, 1e-3, 150, "base_model")


# -- LAG -------------------------------------------------------------------------------------------------------


def with_mask(monkeypatch, value: bool) -> None:
    monkeypatch.setattr(lag, "above_median", lambda attention: torch.full_like(attention, value, dtype=torch.bool))


def test_lag_with_the_mask_everywhere_equals_merged_weights(trained, base, concept, monkeypatch):
    trained.sampling = LAG(lag=True)
    with_mask(monkeypatch, True)
    context = guided_context(base, concept)
    with trained.attach(base):
        answer = predict(base, context)
    merge(trained, base)
    torch.testing.assert_close(predict(base, context), answer, atol=1e-5, rtol=0)


def test_lag_with_the_mask_nowhere_is_the_base_model_to_the_bit(trained, base, concept, monkeypatch):
    trained.sampling = LAG(lag=True)
    with_mask(monkeypatch, False)
    context = guided_context(base, concept)
    expected = predict(base, context)
    with trained.attach(base):
        assert torch.equal(predict(base, context), expected)


def test_lag_leaves_a_prompt_without_the_concept_to_the_base_model(trained, base, concept):
    trained.sampling = LAG(lag=True)
    context = base.encode(["a photo of the desert", PROMPT], concept)
    expected = predict(base, context)
    with trained.attach(base):
        sampled = predict(base, context)
    assert torch.equal(sampled[0], expected[0])
    assert not torch.equal(sampled[1], expected[1])


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("unconditional", ["reuse", "off", "full"])
def test_lag_is_eq_3_as_a_plain_loop_computes_it(unconditional, trained, base, concept):
    """f + M A B x, with M from a naive softmax; rows 0 and 1 are the prompt-free half of rows 2 and 3."""
    trained.sampling = LAG(lag=True, lag_unconditional=unconditional)
    context = guided_context(base, concept)
    entered: dict[str, dict[str, torch.Tensor]] = {layer: {} for layer in LAYERS}
    plain: dict[str, torch.Tensor] = {}
    handles = []
    for layer, block in base.transformers.items():
        attention: Any = block.transformer_blocks[0].attn2
        kept = entered[layer]
        for name, module in (("q", attention.to_q), ("k", attention.to_k), ("x", block.proj_out)):
            handles.append(
                module.register_forward_pre_hook(lambda m, args, kept=kept, name=name: kept.update({name: args[0]}))
            )
        handles.append(block.proj_out.register_forward_hook(lambda m, a, out, layer=layer: plain.update({layer: out})))
    seen: dict[str, torch.Tensor] = {}
    with hooked(*handles), trained.attach(base):  # first what enters and the plain output, then LAG's
        after = [
            block.proj_out.register_forward_hook(lambda m, a, out, layer=layer: seen.update({layer: out}))
            for layer, block in base.transformers.items()
        ]
        with hooked(*after):
            predict(base, context)

    words = context.concept.numpy()
    inside = []
    for layer, block in base.transformers.items():
        attention, kept = block.transformer_blocks[0].attn2, entered[layer]
        residual: Any = trained.residuals[f"{layer}.proj_out".replace(".", "/")]
        a, b = residual.A.double().detach().numpy(), residual.B.double().detach().numpy()
        wq, wk = attention.to_q.weight.double().numpy(), attention.to_k.weight.double().numpy()
        x, f, answer = (t.double().numpy() for t in (kept["x"], plain[layer], seen[layer]))
        if x.ndim == 4:  # (B, m, h, w) -> (B, N, m)
            x, f, answer = (t.reshape(*t.shape[:2], -1).swapaxes(1, 2) for t in (x, f, answer))
        masks = []
        for row in range(4):
            looked, heads = np.zeros(x.shape[1]), attention.heads
            q, k = kept["q"][row].double().numpy() @ wq.T, kept["k"][row].double().numpy() @ wk.T
            d = q.shape[1] // heads
            for head in range(heads):
                part = slice(head * d, (head + 1) * d)
                p = softmax(q[:, part] @ k[:, part].T / np.sqrt(d))
                looked += p[:, words[row]].sum(axis=1) / heads
            middle = np.sort(looked)[(len(looked) - 1) // 2]
            masks.append(looked > middle)
        if unconditional == "reuse":
            masks[0], masks[1] = masks[2], masks[3]
        else:
            masks[0] = masks[1] = np.full(x.shape[1], unconditional == "full")
        for row, mask in enumerate(masks):
            expected = f[row] + mask[:, None] * (x[row] @ (a @ b).T)
            np.testing.assert_allclose(answer[row], expected, atol=1e-4)
            assert np.array_equal(answer[row][~mask], f[row][~mask])
        inside.append([mask.mean() for mask in masks])
    assert {tuple(row) for row in np.array(inside)[[0, -1], 2:]} == {(0.5, 0.5)}


def test_the_mask_is_that_of_the_layer_itself(trained, base, concept, monkeypatch):
    """Looking elsewhere in one layer changes that layer's mask alone."""
    trained.sampling = LAG(lag=True)
    masks: list[dict[str, torch.Tensor]] = []
    context = base.encode([PROMPT], concept)
    for turned in (False, True):
        found: dict[str, torch.Tensor] = {}

        def noted(call, layer, *rest, found=found):
            return found.setdefault(layer, lag.region(call, layer, *rest))

        monkeypatch.setattr(residuals, "region", noted)
        if turned:
            weight: Any = base.transformers[LAYERS[-1]].transformer_blocks[0].attn2.to_k.weight
            with torch.no_grad():
                weight *= -1
        with trained.attach(base):
            predict(base, context)
        masks.append(found)
    changed = [layer for layer in LAYERS if not torch.equal(masks[0][layer], masks[1][layer])]
    assert changed == [LAYERS[-1]]


def test_lag_works_where_the_unet_runs_in_bfloat16(concept):
    for linear in (False, True):
        base = tiny_base(linear, dtype=torch.bfloat16)
        method: Any = disturbed(PersonalizedResiduals(Config(), base, concept)).eval()
        method.sampling = LAG(lag=True)
        context = guided_context(base, concept)
        expected = predict(base, context)
        with method.attach(base):
            answer = predict(base, context)
        assert answer.isfinite().all() and not torch.equal(answer, expected)


def test_residuals_of_two_concepts_add_up_in_either_order(base, concept):
    """Nothing of a method stays in another's way."""
    one: Any = disturbed(PersonalizedResiduals(Config(), base, concept), seed=1).eval()
    other: Any = disturbed(PersonalizedResiduals(Config(), base, concept), seed=2).eval()
    context = base.encode([PROMPT], concept)
    with one.attach(base), other.attach(base):
        first = predict(base, context)
    with other.attach(base), one.attach(base):
        torch.testing.assert_close(predict(base, context), first, atol=1e-5, rtol=0)
