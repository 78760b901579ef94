"""Training tells Stable Diffusion XL's U-Net the sizes of each training image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from personalize_core.base_model.hooks import hooked
from personalize_core.concepts.images import ConceptLatents
from personalize_core.methods import method_class
from personalize_core.methods.interface import Batch, equal_shares
from personalize_core.training.checkpoints import Checkpoints
from personalize_core.training.fixed_batch import fixed_batch_losses
from personalize_core.training.loop import train
from tests.conftest import EVERY_STEP, equal_bits, sample_latents, tiny_base, tiny_images, tiny_xl
from tests.training.test_loop import CutOff, cut_off_after

OWN = [[900.0, 1200.0, 0.0, 4.0, 16.0, 16.0], [40.0, 30.0, 2.0, 0.0, 16.0, 16.0], [16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]


def of(sizes: Sequence[Sequence[float]] | None) -> ConceptLatents:
    told = None if sizes is None else [torch.tensor([row]) for row in sizes]
    return ConceptLatents(tiny_images().concept, sizes=told)


def made(base: Any, concept: Any) -> Any:
    kind: Any = method_class("personalized_residuals")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(kind.Config(steps=3, batch_size=3), base, concept)


def told_in(base: Any, work: Any) -> list[list[list[float]]]:
    found: list[list[list[float]]] = []

    def look(unet: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append(kwargs["added_cond_kwargs"]["time_ids"].tolist())

    with hooked(base.unet.register_forward_pre_hook(look, with_kwargs=True)):
        work()
    return found


def test_images_of_different_sizes_in_a_batch_give_different_time_ids(concept):
    base = tiny_xl()
    told = told_in(base, lambda: train(made(base, concept), base, of(OWN), seed=0))
    assert len(told) == 3 and all(sorted(call) == sorted(OWN) for call in told)


def test_sizes_matter_and_those_of_a_whole_image_are_what_is_told_without_any(concept):
    base = tiny_xl()
    learned = []
    for sizes in (OWN, [OWN[2]] * 3, None):
        method = made(base, concept)
        train(method, base, of(sizes), seed=0)
        learned.append(method.state_dict())
    own, whole, untold = learned
    assert equal_bits(whole, untold) and not equal_bits(own, untold)


def test_images_are_sampled_as_whole_ones_whatever_was_trained_on(concept):
    base = tiny_xl()
    method = made(base, concept)
    train(method, base, of(OWN), seed=0)
    told = told_in(base, lambda: sample_latents(method, base, ["a photo of <v> dog"]))
    assert told and all(row == OWN[2] for call in told for row in call)


def test_a_run_on_sized_images_resumes_to_the_same_bits(concept, tmp_path):
    base = tiny_xl()
    undisturbed, resumed = made(base, concept), made(base, concept)
    expected = train(undisturbed, base, of(OWN), seed=0)
    checkpoints = Checkpoints(tmp_path, "this run", **EVERY_STEP)
    with pytest.raises(CutOff):
        train(made(base, concept), base, of(OWN), 0, cut_off_after(2), checkpoints)
    heard: list[Any] = []
    assert train(resumed, base, of(OWN), 0, heard.append, checkpoints) == expected
    assert heard == expected[1:]
    assert equal_bits(resumed.state_dict(), undisturbed.state_dict())


def test_stable_diffusion_1_is_told_nothing(concept):
    base, learned = tiny_base(), []
    for sizes in (OWN, None):
        method = made(base, concept)
        train(method, base, of(sizes), seed=0)
        learned.append(method.state_dict())
    assert equal_bits(*learned)


def test_the_fixed_batch_is_told_of_the_views_that_it_shows(concept):
    base = tiny_xl()
    told = told_in(base, lambda: fixed_batch_losses(made(base, concept), base, of(OWN), seed=0))
    assert [call[0] for call in told] == OWN and all(row == call[0] for call in told for row in call)


def test_a_batch_followed_by_another_knows_the_sizes_of_both():
    def batch(sizes: torch.Tensor | None) -> Batch:
        return Batch(torch.zeros(2, 4, 8, 8), ["a", "b"], equal_shares(2), sizes)

    one, other = torch.arange(12.0).view(2, 6), 100 + torch.arange(12.0).view(2, 6)
    joined = batch(one).followed_by(batch(other))
    assert joined.sizes is not None and joined.sizes[:, 0].tolist() == [0, 6, 100, 106]
    part = joined.part(slice(1, 3)).sizes
    assert part is not None and part[:, 0].tolist() == [6, 100]
    with pytest.raises(ValueError, match="or of neither"):
        batch(one).followed_by(batch(None))
