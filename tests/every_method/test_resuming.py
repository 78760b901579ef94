"""Every method's training depends on its seed alone, also when it was cut off. No test here knows a method's name."""

from __future__ import annotations

import pytest
import torch

from personalize_core.training.checkpoints import Checkpoints
from personalize_core.training.loop import train
from tests.conftest import draw, equal_bits, snapshot
from tests.every_method.cases import CutOff, of_learning


@of_learning
def test_the_same_seed_teaches_it_the_same_whatever_the_global_seed(case, base, concept, images):
    one, same, other = (case.make(base, concept) for _ in range(3))
    torch.manual_seed(1)
    log = train(one, base, images, seed=5)
    torch.manual_seed(2)
    assert train(same, base, images, seed=5) == log
    train(other, base, images, seed=6)
    assert equal_bits(one.state_dict(), same.state_dict())
    assert not equal_bits(one.state_dict(), other.state_dict())


@of_learning
def test_training_and_drawing_leave_torchs_global_random_state_alone(case, base, concept, images):
    method, before = case.make(base, concept), torch.random.get_rng_state()
    train(method, base, images, seed=0)
    draw(method, base, [method.say("a photo of {}")])
    assert torch.equal(torch.random.get_rng_state(), before)


@of_learning
def test_a_run_that_was_cut_off_resumes_to_the_same_bits(case, base, concept, images, tmp_path):
    undisturbed = case.make(base, concept)
    expected = train(undisturbed, base, images, seed=0)

    def cut_off(row):
        if row["step"] == 1:
            raise CutOff

    checkpoints = Checkpoints(tmp_path, stamp="this run", every_seconds=0)
    before = snapshot(base)
    with pytest.raises(CutOff):
        train(case.make(base, concept), base, images, 0, cut_off, checkpoints)
    assert equal_bits(snapshot(base), before)
    resumed, logged = case.make(base, concept, seed=99), []
    assert train(resumed, base, images, 0, logged.append, checkpoints) == expected
    assert logged[0]["step"] == 1  # it did go on, rather than start again
    assert equal_bits(resumed.state_dict(), undisturbed.state_dict())
