"""DTI trains the direction of one input embedding on a sphere whose radius is the norm of the vocabulary's."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from personalize_core.concepts.concept import Concept
from personalize_core.methods.dti.method import Config, DirectionalTextualInversion, SphereDescent
from personalize_core.training.loop import add_gradients, denoising_step, diffusion_loss, noisy_rows, train
from tests.conftest import disturbed


def make(base, concept, **chosen) -> DirectionalTextualInversion:
    return DirectionalTextualInversion(Config(**{"steps": 3, "batch_size": 2, **chosen}), base, concept)


def naive_step(v: np.ndarray, loss_gradient: np.ndarray, mu: np.ndarray, kappa: float, lr: float) -> np.ndarray:
    """As the method is described, on the unit sphere, with the prior's constant gradient -kappa mu."""
    g = loss_gradient - kappa * mu
    tangent = (np.eye(len(v)) - np.outer(v, v)) @ g
    moved = v - lr * tangent / np.linalg.norm(tangent)
    return moved / np.linalg.norm(moved)


def test_a_step_goes_down_the_tangent_by_the_rate_and_back_to_the_sphere():
    """On a loss whose gradient by e = m v is known, in float64."""
    draw = torch.Generator().manual_seed(0)
    start, target = (torch.randn(5, generator=draw, dtype=torch.float64) for _ in range(2))
    v, m, lr = start / start.norm(), torch.tensor(3.0, dtype=torch.float64), 0.3
    e = torch.nn.Parameter(m * v)
    optimizer = SphereDescent([{"params": [e], "lr": lr}], m)
    expected = v.numpy()
    for _ in range(4):
        optimizer.zero_grad()
        (e - target).pow(2).sum().backward()
        before = expected
        by_v = 3.0 * 2 * (3.0 * before - target.numpy())  # the chain rule through e = m v
        expected = naive_step(before, by_v, np.zeros(5), 0.0, lr)
        optimizer.step()
        np.testing.assert_allclose(e.detach().numpy(), 3.0 * expected, atol=1e-12)
        angle = math.acos(before @ expected)
        assert angle == pytest.approx(math.atan(lr), abs=1e-9)  # whatever the gradient's length


def test_a_vector_off_the_sphere_is_put_on_it():
    e = torch.nn.Parameter(torch.tensor([0.0, 9.0]))
    e.grad = torch.tensor([0.0, 5.0])  # points outwards: nothing of it is tangent
    SphereDescent([{"params": [e], "lr": 0.5}], torch.tensor(2.0)).step()
    torch.testing.assert_close(e.detach(), torch.tensor([0.0, 2.0]))


def test_training_takes_naive_steps_with_the_prior_pulling_to_the_initial_word(base, concept, images):
    """The whole step, from the loop's own batches: a strong prior, so that leaving it out would show."""
    c = {"steps": 3, "kappa": 0.05, "lr": 0.2, "norm": "mean"}
    method, reference = disturbed(make(base, concept, **c)), disturbed(make(base, concept, **c))
    word = base.word_embedding("dog").double().numpy()
    mu = word / np.linalg.norm(word)
    m = np.linalg.norm(base.text_encoders.tables[0].weight.detach().double().numpy(), axis=1).mean()
    log = train(method, base, images, seed=4)
    (stage,) = reference.train().stages()
    vector = reference.embedding.vector
    v = vector.detach().double().numpy()
    v = v / np.linalg.norm(v)
    for index, row in enumerate(log):
        step = denoising_step(reference, base, images, stage, seed=4, index=index)
        (by_e,) = torch.autograd.grad(diffusion_loss(step), vector)
        read = vector.detach().double().numpy()  # the first is off the sphere
        assert row["prior"] == pytest.approx(-0.05 * mu @ read / m, rel=1e-4)
        v = naive_step(v, m * by_e.double().numpy(), mu, 0.05, 0.2)
        with torch.no_grad():
            vector.copy_(torch.tensor(m * v))
    np.testing.assert_allclose(method.embedding.vector.numpy(), m * v, atol=2e-4)


def test_the_prior_is_the_logarithm_of_a_von_mises_fisher_density_but_for_a_constant(base, concept, images):
    """Its gradient by the direction is -kappa mu everywhere; a part of a batch has its share."""
    method = disturbed(make(base, concept, kappa=0.7, norm="initial")).train()
    (stage,) = method.stages()
    step = denoising_step(method, base, images, stage, seed=0, index=0)
    (by_e,) = torch.autograd.grad(stage.penalties(step)["prior"], method.embedding.vector)
    word = base.word_embedding("dog")
    torch.testing.assert_close(by_e * word.norm(), -0.7 * word / word.norm())
    part = stage.penalties(replace(step, share=0.25))["prior"]
    torch.testing.assert_close(part, 0.25 * stage.penalties(step)["prior"])


def test_without_concentration_there_is_no_prior(base, concept, images):
    method = make(base, concept, kappa=0.0).train()
    (stage,) = method.stages()
    with method.attach(base):
        losses = add_gradients(stage, method, base, noisy_rows(method, base, images, stage, 0, 0), [slice(0, 2)])
    assert set(losses) == {"diffusion"}


@pytest.mark.parametrize("norm", ["mean", "initial"])
def test_the_embedding_keeps_the_direction_of_the_class_noun_and_a_norm_of_the_vocabulary(norm, base):
    with torch.no_grad():
        base.text_encoders.tables[0].weight[:40] = 0  # rows that are no words
    rows = base.text_encoders.tables[0].weight.detach().double().numpy()[40:]
    bear = base.word_embedding("bear")
    method = make(base, Concept("b", "<b>", "teddy bear"), norm=norm)
    expected = np.sqrt((rows**2).sum(axis=1)).mean() if norm == "mean" else bear.norm().item()
    assert method.embedding.vector.norm().item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(method.embedding.vector, bear, dim=0).item(), 1.0)


def test_training_turns_the_embedding_and_leaves_its_norm(base, concept, images):
    method = make(base, concept, lr=0.1)
    start = method.embedding.vector.norm().item()
    log = train(method, base, images, seed=0)
    assert [row["learned"]["v_norm"] for row in log] == pytest.approx([start] * 3, rel=1e-6)
    assert log[-1]["learned"]["v_cosine"] < 0.999
    assert log[0]["learned"]["v_cosine"] == pytest.approx(math.cos(math.atan(0.1)), abs=1e-5)


def test_the_runs_optimizer_has_no_say(base, concept, images):
    found = [make(base, concept), make(base, concept)]
    for method, name in zip(found, ("adamw", "adamw8bit"), strict=True):  # the second is not even installed everywhere
        train(method, base, images, seed=0, optimizer_name=name)
    assert torch.equal(found[0].embedding.vector, found[1].embedding.vector)


def test_the_placeholder_stands_alone_in_textual_inversions_prompts(base, concept, images):
    method = make(base, concept)
    prompts = method.batch(images, 300, torch.Generator().manual_seed(0)).prompts
    assert set(prompts) == {template.replace("{}", "<v>") for template in method.templates}
    assert len(set(prompts)) == 27


def test_the_recipe_is_the_authors():
    c = Config()
    assert (c.steps, c.batch_size, c.lr, c.kappa, c.norm) == (400, 4, 4 * 0.01, 1e-4, "mean")
    assert (c.preprocessing.geometry, c.preprocessing.interpolation, c.preprocessing.flip) == ("crop", "bicubic", False)
