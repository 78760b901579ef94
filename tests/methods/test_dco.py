"""DCO minimizes -log sigmoid of how much better than the base model the concept images are predicted."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from personalize_core.methods.dco.method import Config, DirectConsistency
from personalize_core.methods.shared.layer_modules import attention_projections
from personalize_core.training.fixed_inputs import losses_on_fixed_inputs
from personalize_core.training.loop import add_gradients, denoising_step, diffusion_loss, noisy_rows, train
from tests.conftest import disturbed


def make(base, concept, **chosen) -> DirectConsistency:
    return DirectConsistency(Config(**{"steps": 3, "batch_size": 3, "rank": 2, **chosen}), base, concept)


def squared_errors(base, step, prompts: list[str], concept, embedding=None) -> np.ndarray:
    """Row by row."""
    found = []
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            said = base.denoise(step.x_t[[row]], step.t[[row]], base.encode([prompt], concept, embedding))
        found.append(np.square(said.double().numpy() - step.target[[row]].double().numpy()).mean())
    return np.array(found)


@pytest.fixture
def parts(base, concept, images) -> Any:
    """A method that learned something, a step of it, and the base model with its changes written into a copy."""
    method = disturbed(make(base, concept, beta=7.0)).train()
    (stage,) = method.stages()
    with method.attach(base):
        step = denoising_step(method, base, images, stage, seed=0, index=0)
        found = stage.objective(step).sum()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for path, layer in attention_projections(tuned).items():
            change: Any = method.changes.of(path)
            layer.weight += change.B @ change.A
    return method, stage, step, found, tuned


def test_the_objective_is_the_formula_row_by_row(parts, base, concept):
    method, _, step, found, tuned = parts
    mine = squared_errors(tuned, step, ["a photo of a <v>"] * 3, concept, method.embedding.vector)
    theirs = squared_errors(base, step, ["a photo of a dog"] * 3, concept)
    expected = np.mean([-math.log(1 / (1 + math.exp(7.0 * gap)) + 1e-300) for gap in mine - theirs])
    assert found.item() == pytest.approx(expected, rel=1e-3)
    assert np.abs(7.0 * (mine - theirs)).min() > 1e-2  # else it would be log 2 whatever beta is


def test_its_gradient_is_that_of_each_rows_error_times_beta_and_a_sigmoid(parts, base, concept):
    method, _, step, found, tuned = parts
    gap = squared_errors(tuned, step, ["a photo of a <v>"] * 3, concept, method.embedding.vector) - squared_errors(
        base, step, ["a photo of a dog"] * 3, concept
    )
    factors = torch.tensor(7.0 / (1 + np.exp(-7.0 * gap)) / 3, dtype=torch.float32)
    trained = list(method.parameters())
    errors = (step.prediction - step.target).pow(2).mean(dim=(1, 2, 3))
    expected = torch.autograd.grad((factors * errors).sum(), trained, retain_graph=True)
    for one, other in zip(torch.autograd.grad(found, trained), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=2e-3)


def test_the_loop_minimizes_it_in_the_diffusion_losss_place(base, concept, images):
    method = disturbed(make(base, concept, beta=7.0)).train()
    (stage,) = method.stages()
    with method.attach(base):
        rows = noisy_rows(method, base, images, stage, 0, 0)
        losses = add_gradients(stage, method, base, rows, [slice(0, 3)])
        gradient = torch.cat([p.grad.flatten() for p in method.parameters()])
        step = denoising_step(method, base, images, stage, seed=0, index=0)
        objective = stage.objective(step).sum()
        own = torch.autograd.grad(objective, list(method.parameters()))
    assert losses == {"diffusion": pytest.approx(objective.item(), rel=1e-5)}
    torch.testing.assert_close(gradient, torch.cat([part.flatten() for part in own]), atol=1e-6, rtol=1e-3)
    assert losses["diffusion"].item() != pytest.approx(diffusion_loss(step).item(), rel=0.01)


def test_it_starts_at_log_two(base, concept, images):
    """Before the first step the U-Net is the base model's, and the placeholder reads the class noun."""
    log = train(make(base, concept, steps=1), base, images, seed=0)
    assert log[0]["diffusion"] == pytest.approx(math.log(2), abs=1e-4)


def test_on_fixed_inputs_it_is_the_objective_too(base, concept, images):
    """Row by row the eighth part of log 2, before anything is learned; the diffusion loss would be about one."""
    method = make(base, concept).train()
    (stage,) = method.stages()
    with method.attach(base):
        losses = losses_on_fixed_inputs(method, base, images, stage, seed=0)
    np.testing.assert_allclose(losses, np.full(8, math.log(2) / 8), atol=1e-4)


def test_the_changes_act_again_after_the_base_model_was_asked(parts, base, concept, images):
    method, stage, step, _, _ = parts
    with method.attach(base):
        again = denoising_step(method, base, images, stage, seed=0, index=0)
    assert torch.equal(again.prediction, step.prediction)


def test_without_beta_it_is_the_diffusion_loss(base, concept):
    (stage,) = make(base, concept, beta=0.0).stages()
    assert stage.objective is None


def test_the_embeddings_norm_is_put_back_after_every_step(base, concept, images):
    method = make(base, concept, embedding_lr=0.1)
    start = method.embedding.vector.norm().item()
    log = train(method, base, images, seed=0)
    assert [row["learned"]["v_norm"] for row in log] == pytest.approx([start] * 3, rel=1e-5)
    assert log[-1]["learned"]["v_cosine"] < 0.9999


def test_embedding_and_changes_have_rates_of_their_own(base, concept):
    (stage,) = make(base, concept).stages()
    assert [group["lr"] for group in stage.param_groups] == [5e-5, 5e-6]
    assert stage.param_groups[1]["params"][0].shape == (base.text_width,)


def test_the_recipe_is_the_readmes():
    c = Config()
    assert (c.rank, c.beta, c.steps, c.lr, c.embedding_lr) == (32, 1000.0, 2000, 5e-5, 5e-6)
