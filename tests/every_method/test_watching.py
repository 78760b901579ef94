"""Every method learns the same bits whether it is watched or not, and can be watched at all."""

from __future__ import annotations

import torch

from personalize_core.sampling.sampler import initial_noise, make_sampler, sample
from personalize_core.training.loop import train
from personalize_core.training.watch import Probed, Probes, Watch
from tests.conftest import disturbed, equal_bits, snapshot, tiny_images
from tests.every_method.cases import CONCEPT, of_learning


@of_learning
def test_who_is_watched_learns_the_same_and_leaves_the_base_model_alone(case, base):
    """It samples with the method as it is then, in the middle of its training."""
    alone, watched = (disturbed(case.make(base, CONCEPT)) for _ in range(2))
    before, places = snapshot(base), [(0, 0), (1, 0)]
    looks = []

    def look(method):
        prompts = [method.say("a photo of a {}"), "a photo of a dog"]
        latents = sample(
            method, base, prompts, initial_noise(base, 0, places), make_sampler("ddim", base), steps=1, guidance=2.0
        )
        looks.append(latents)
        return Probed(torch.zeros(2, 1, 1, 3, dtype=torch.uint8), {"identity": latents.flatten(1).mean(dim=1).tolist()})

    expected = train(alone, base, tiny_images(), 5)
    watch = Watch(watched, base, tiny_images(), 5, Probes(look, images=1, sampling_steps=0), share=50.0)
    rows = train(watched, base, tiny_images(), 5, watcher=watch)
    assert equal_bits(watched.state_dict(), alone.state_dict())
    assert [{name: value for name, value in row.items() if name != "fixed_inputs"} for row in rows] == expected
    assert len(looks) == len(expected) + 1 and len(watch.losses) == len(expected) + len(watch.stages)
    assert equal_bits(snapshot(base), before)
