"""What is true of every method as it is trained. No test here knows a method's name.

Most tests look at one training, which they share; those of seeds and of interruptions repeat it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from personalize_core.base_model.model import BaseModel
from personalize_core.methods.interface import Method
from personalize_core.training.checkpoints import Checkpoints, LogRow
from personalize_core.training.loop import denoising_step, diffusion_loss, train
from tests.conftest import EVERY_STEP, disturbed, equal_bits, sample_latents, snapshot, tiny_images
from tests.every_method.cases import CONCEPT, Case, CutOff, of_learning, trained_once

SEED = 5


def copy_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def embeddings_of(method: Method) -> list[NDArray[np.float64]]:
    """Each learned embedding, as (vectors, text_width) or with more dimensions before these."""
    return [
        parameter.detach().double().numpy().copy()
        for name, parameter in method.named_parameters()
        if name.startswith("embedding")
    ]


def untrained(case: Case, base: BaseModel, seed: int = 0) -> Method:
    """With its parameters moved, so that no part starts without an effect on the loss."""
    return disturbed(case.make(base, CONCEPT, seed))


def cut_off_at_first_step(row: LogRow) -> None:
    """A log that ends the training."""
    raise CutOff


@dataclass
class Training:
    """One training, with what was there before it."""

    method: Method
    base: BaseModel
    base_before: dict[str, Tensor]
    random_before: Tensor
    initial_embeddings: list[NDArray[np.float64]]
    start: dict[str, Tensor]
    log: list[LogRow] = field(default_factory=list)
    after_first_step: dict[str, Tensor] = field(default_factory=dict)
    embeddings: list[list[NDArray[np.float64]]] = field(default_factory=list)  # after each step
    random_after: Tensor = field(default_factory=torch.random.get_rng_state)


@pytest.fixture(scope="module")
def training(case: Case) -> Training:
    base = case.base()
    method = case.make(base, CONCEPT)
    initial = embeddings_of(method)
    disturbed(method)
    torch.manual_seed(1)
    found = Training(method, base, snapshot(base), torch.random.get_rng_state(), initial, copy_of(method.state_dict()))

    def log(row: LogRow) -> None:
        found.embeddings.append(embeddings_of(method))
        if not found.after_first_step:
            found.after_first_step = copy_of(method.state_dict())

    found.log = train(method, base, tiny_images(), SEED, log)
    found.random_after = torch.random.get_rng_state()
    return found


@trained_once
def test_training_changes_the_method_and_no_bit_of_the_base_model(training):
    assert not equal_bits(training.method.state_dict(), training.start)
    assert equal_bits(snapshot(training.base), training.base_before)  # every row of the vocabulary among it


@trained_once
def test_after_training_nothing_asks_for_gradients(training):
    base = training.base
    frozen = [training.method, base.unet, base.text_encoders, base.vae]
    assert not any(parameter.requires_grad for module in frozen for parameter in module.parameters())
    assert not training.method.training


@trained_once
def test_every_learned_tensor_is_reached_by_training(training):
    """A part that is attached in sampling but not in training would stay as it was."""
    learned = training.method.named_parameters()
    assert [name for name, parameter in learned if torch.equal(parameter, training.start[name])] == []


@trained_once
def test_after_each_step_the_log_has_the_rates_and_how_far_a_learned_embedding_has_come(training):
    """The norm of v, and its cosine to what it started as."""
    method, cosines = training.method, []
    stages, width = {stage.name: stage for stage in method.stages()}, training.base.text_width
    vectors = [embedding.reshape(-1, width) for embedding in training.initial_embeddings]
    held = method.config.text_embeddings
    assert sum(map(len, vectors)) == (len(training.base.transformers) if held > 1 else held)
    for row, embeddings in zip(training.log, training.embeddings, strict=True):
        assert row["lr"] == [group["lr"] for group in stages[row["stage"]].param_groups]
        assert ("learned" in row) == (held > 0)
        if held:
            now, start = embeddings[0].reshape(-1, width), vectors[0]
            norms, lengths = np.sqrt((now * now).sum(axis=1)), np.sqrt((start * start).sum(axis=1))
            cosines.append(((now * start).sum(axis=1) / (norms * lengths)).mean())
            assert row["learned"] == {
                "v_norm": pytest.approx(norms.mean(), rel=1e-5),
                "v_cosine": pytest.approx(cosines[-1], abs=1e-5),
            }
    assert not held or min(cosines) < 1


@trained_once
def test_training_and_sampling_leave_torchs_global_random_state_alone(training):
    assert torch.equal(training.random_after, training.random_before)
    before = torch.random.get_rng_state()
    sample_latents(training.method, training.base, [training.method.say("a photo of {}")])
    assert torch.equal(torch.random.get_rng_state(), before)


class CutOffAtOnce(Checkpoints):
    """The first checkpoint is the last thing that the run does."""

    def save(self, *state: Any) -> None:
        super().save(*state)
        raise CutOff


@dataclass
class Interrupted:
    """A training of the same seed that was cut off after its first step, and what it left."""

    folder: Path
    log: list[LogRow]
    state: dict[str, Tensor]


@pytest.fixture(scope="module")
def interrupted(case: Case, training: Training, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    method, found = untrained(case, training.base), Interrupted(tmp_path_factory.mktemp("interrupted"), [], {})
    torch.manual_seed(2)
    checkpoints = CutOffAtOnce(found.folder, stamp="this run", **EVERY_STEP)
    with pytest.raises(CutOff):
        train(method, training.base, tiny_images(), SEED, found.log.append, checkpoints)
    found.state = copy_of(method.state_dict())
    return found


@trained_once
def test_the_same_seed_teaches_it_the_same_whatever_the_global_seed(case, training, interrupted, images):
    """The first step here; the others by the run that goes on from it."""
    assert interrupted.log == training.log[:1]
    assert equal_bits(interrupted.state, training.after_first_step)
    other = untrained(case, training.base)
    with pytest.raises(CutOff):
        train(other, training.base, images, SEED + 1, cut_off_at_first_step)
    assert not equal_bits(other.state_dict(), training.after_first_step)


@trained_once
def test_a_run_that_was_cut_off_resumes_to_the_same_bits(case, training, interrupted, images):
    assert equal_bits(snapshot(training.base), training.base_before)
    resumed, logged = untrained(case, training.base, seed=99), []
    checkpoints = Checkpoints(interrupted.folder, stamp="this run")
    torch.manual_seed(3)
    assert train(resumed, training.base, images, SEED, logged.append, checkpoints) == training.log
    assert logged[0]["step"] == 1  # it did go on, rather than start again
    assert equal_bits(resumed.state_dict(), training.method.state_dict())


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
            for name, loss in {"diffusion": diffusion_loss(step), **stage.penalties(step)}.items():
                gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
                assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients), name


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
                found[prediction_type, stage.name] = step.target, step.prediction, stage.penalties(step)
    for stage in method.stages():
        noise, velocity = found["epsilon", stage.name], found["v_prediction", stage.name]
        assert not torch.equal(noise[0], velocity[0])
        assert torch.equal(noise[1], velocity[1])
        assert noise[2].keys() == velocity[2].keys() and all(torch.equal(noise[2][k], velocity[2][k]) for k in noise[2])
