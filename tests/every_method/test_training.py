"""What is true of every method as it is trained. No test here knows a method's name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from personalize_core.training.loop import denoising_step, diffusion_loss, train
from tests.conftest import disturbed, equal_bits, snapshot
from tests.every_method.cases import of_learning


@of_learning
def test_training_changes_the_method_and_no_bit_of_the_base_model(case, base, concept, images):
    method, before = case.make(base, concept), snapshot(base)
    start = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    train(method, base, images, seed=0)
    assert not equal_bits(method.state_dict(), start)
    assert equal_bits(snapshot(base), before)  # every row of the vocabulary among it


@of_learning
def test_after_training_nothing_asks_for_gradients(case, base, concept, images):
    method = case.make(base, concept)
    train(method, base, images, seed=0)
    frozen = [method, base.unet, base.text_encoder, base.vae]
    assert not any(parameter.requires_grad for module in frozen for parameter in module.parameters())
    assert not method.training


@of_learning
def test_everything_a_method_learns_is_trained_in_some_stage(case, base, concept):
    method = case.make(base, concept)
    trained = {id(p) for stage in method.stages() for group in stage.param_groups for p in group["params"]}
    assert trained == {id(parameter) for parameter in method.parameters()}


@of_learning
def test_each_loss_of_each_stage_moves_something_that_the_stage_trains(case, base, concept, images):
    method = disturbed(case.make(base, concept)).train()
    with method.attach(base):
        for stage in method.stages():
            trained = [parameter for group in stage.param_groups for parameter in group["params"]]
            step = denoising_step(method, base, images, stage, seed=0, index=0)
            for name, loss in {"diffusion": diffusion_loss(step), **stage.penalty(step)}.items():
                gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
                assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients), name


@of_learning
def test_every_learned_tensor_is_reached_by_training(case, base, concept, images):
    """A part that is attached in sampling but not in training would stay as it was."""
    method = disturbed(case.make(base, concept)).train()
    before = {name: parameter.clone() for name, parameter in method.named_parameters()}
    train(method, base, images, seed=0)
    unmoved = [name for name, parameter in method.named_parameters() if torch.equal(parameter, before[name])]
    assert unmoved == []


@of_learning
def test_after_each_step_the_log_has_the_rates_and_how_far_a_learned_embedding_has_come(case, base, concept, images):
    """The norm of v, and its cosine to what it started as."""
    method, cosines = case.make(base, concept), []
    stages = {stage.name: stage for stage in method.stages()}
    width, held = base.text_width, method.config.text_embeddings
    learned = [parameter for name, parameter in method.named_parameters() if name.startswith("embedding")]
    starts = [parameter.detach().double().numpy().reshape(-1, width).copy() for parameter in learned]
    assert sum(map(len, starts)) == held

    def check(row) -> None:
        assert row["lr"] == [group["lr"] for group in stages[row["stage"]].param_groups]
        assert ("learned" in row) == (held > 0)
        if held:
            now, start = learned[0].detach().double().numpy().reshape(-1, width), starts[0]
            norms, lengths = np.sqrt((now * now).sum(axis=1)), np.sqrt((start * start).sum(axis=1))
            cosines.append(((now * start).sum(axis=1) / (norms * lengths)).mean())
            assert row["learned"] == {
                "v_norm": pytest.approx(norms.mean(), rel=1e-5),
                "v_cosine": pytest.approx(cosines[-1], abs=1e-5),
            }

    train(method, base, images, seed=0, log=check)
    assert not held or min(cosines) < 1


@of_learning
def test_what_the_base_model_predicts_changes_the_target_and_no_penalty(case, concept, images):
    """Noise for Stable Diffusion 1, velocity for 2.1; attention and words are the same under both."""
    found = {}
    for prediction_type in ("epsilon", "v_prediction"):
        base = case.base(prediction_type=prediction_type)
        method = disturbed(case.make(base, concept)).train()
        with method.attach(base):
            for stage in method.stages():
                torch.manual_seed(0)  # dropout's
                step = denoising_step(method, base, images, stage, seed=0, index=0)
                found[prediction_type, stage.name] = step.target, step.prediction, stage.penalty(step)
    for stage in method.stages():
        noise, velocity = found["epsilon", stage.name], found["v_prediction", stage.name]
        assert not torch.equal(noise[0], velocity[0])
        assert torch.equal(noise[1], velocity[1])
        assert noise[2].keys() == velocity[2].keys() and all(torch.equal(noise[2][k], velocity[2][k]) for k in noise[2])
