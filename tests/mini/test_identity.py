"""The identity encoder's loss is the cross-entropy it claims to be, and its memory forgets the oldest first."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from personalize_core.mini import identity, networks, world


def rows(seed, count, width=6):
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def naive(student, teacher, owners, rows, row_owners):
    """The mean over things of minus the log of the softmax at the thing itself, in NumPy float64."""
    total = 0.0
    for n in range(len(student)):
        answers = [(student[n] @ t, True) for t in teacher]
        answers += [(student[n] @ r, o >= 0 and o != owners[n]) for r, o in zip(rows, row_owners, strict=True)]
        exponentials = [np.exp(score / identity.TEMPERATURE) for score, counts in answers if counts]
        total -= np.log(np.exp(student[n] @ teacher[n] / identity.TEMPERATURE) / sum(exponentials))
    return total / len(student)


@pytest.fixture
def filled():
    memory = identity.Memory(5, 6)
    memory.add(rows(3, 4), torch.tensor([7, 8, 1, 9]))  # the first place is empty still; thing 1 is asked for too
    return memory


def test_the_loss_is_the_cross_entropy_over_batch_and_memory_without_empty_rows_and_the_thing_itself(filled):
    student, teacher, owners = rows(1, 3), rows(2, 3), torch.tensor([0, 1, 2])
    found = float(identity.distillation(student, teacher, owners, filled))
    arrays = [x.double().numpy() for x in (student, teacher, owners, filled.rows, filled.owners)]
    assert found == pytest.approx(naive(*arrays), rel=1e-5)


def test_its_gradient_reaches_the_student_alone_and_is_the_difference_quotient(filled):
    student, teacher, owners = rows(1, 3).double().requires_grad_(), rows(2, 3).double(), torch.tensor([0, 1, 2])
    filled = filled.double()
    identity.distillation(student, teacher, owners, filled).backward()
    arrays = [x.detach().numpy() for x in (teacher, owners, filled.rows, filled.owners)]
    assert student.grad is not None
    for index in np.ndindex(3, 6):
        step = np.zeros((3, 6))
        step[index] = 1e-5
        up, down = (naive(student.detach().numpy() + sign * step, *arrays) for sign in (1, -1))
        assert float(student.grad[index]) == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-8)


def test_the_memory_keeps_the_last(filled):
    assert filled.owners.tolist() == [-1, 7, 8, 1, 9]
    filled.add(rows(4, 2), torch.tensor([10, 11]))
    assert filled.owners.tolist() == [8, 1, 9, 10, 11]
    assert torch.equal(filled.rows[3:], rows(4, 2)) and torch.equal(filled.rows[:3], rows(3, 4)[1:])


def test_designs_differ_and_are_on_sprites_of_the_training():
    found = identity.designs(np.random.default_rng(0), 300)
    assert len(set(found)) == 300
    sprites = {sprite for variants in world.VARIANTS.values() for sprite in variants}
    assert {design.sprite for design in found} <= sprites


def test_a_shifted_picture_is_the_picture_moved_by_at_most_so_much():
    image = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    moved, most = identity.shifted(image, np.random.default_rng(1)), identity.SHIFT
    found = set()
    for before, after in zip(image, moved, strict=True):
        inner = before[most:-most, most:-most]
        places = [
            (y, x)
            for y in range(2 * most + 1)
            for x in range(2 * most + 1)
            if np.array_equal(after[y : y + len(inner), x : x + len(inner)], inner)
        ]
        assert len(places) == 1
        found.add(places[0])
    assert len(found) > 5


class Tiny(identity.Identity):
    """With a handful of random views in place of drawn ones, and without the autoencoder."""

    def __init__(self, tmp_path):
        rng = np.random.default_rng(0)
        np.save(tmp_path / "identity_views_0_8.npy", rng.integers(0, 256, (8, 5, 64, 64, 3), np.uint8))
        networks.autoencoder().save_pretrained(tmp_path / "vae")
        super().__init__(batch=3, work=tmp_path, things=8, memory=6)


def test_it_goes_on_from_a_checkpoint_as_if_it_had_never_stopped_its_memory_included(tmp_path):
    from personalize_core.mini import loop

    whole, first, second = Tiny(tmp_path), Tiny(tmp_path), Tiny(tmp_path)
    loop.train(whole, 4, tmp_path / "whole")
    loop.train(first, 4, tmp_path / "split", until=2)
    loop.train(second, 4, tmp_path / "split")
    for name, module in whole.modules.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, second.modules[name].state_dict()[key]), (name, key)
    assert (whole.memory.owners >= 0).all() and not torch.equal(whole.memory.rows, first.memory.rows)


def test_a_step_teaches_the_student_and_leaves_the_teacher_to_its_average(tmp_path):
    stage = Tiny(tmp_path)
    before = {k: v.clone() for k, v in stage.teacher.state_dict().items()}
    loss, seen = stage.step(0, np.random.default_rng(0), torch.Generator().manual_seed(0))
    loss.backward()
    assert seen == 6 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.student.parameters())
    assert all(torch.equal(v, before[k]) for k, v in stage.teacher.state_dict().items())
    stage.optimizer.step()
    stage.after_step(0)  # the first decay is 1 in 10
    key = "module.layernorm.bias"
    expected = before[key] * 0.1 + stage.student.state_dict()["layernorm.bias"] * 0.9
    assert torch.allclose(stage.teacher.state_dict()[key], expected, atol=1e-7)
