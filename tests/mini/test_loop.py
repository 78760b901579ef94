"""Training goes on from a checkpoint as if it had never stopped, bit for bit."""

import torch

from personalize_core.mini import loop
from personalize_core.mini.text import Text


class Tiny(Text):
    def __init__(self):
        super().__init__(seed=1, batch=2)


def weights(stage):
    return [p.detach().clone() for p in stage.network.parameters()]


def test_four_steps_are_two_and_then_two(tmp_path):
    whole, first, second = Tiny(), Tiny(), Tiny()
    loop.train(whole, 4, tmp_path / "whole")
    loop.train(first, 4, tmp_path / "split", until=2)
    progress = loop.train(second, 4, tmp_path / "split")
    assert (progress.step, progress.samples) == (4, 8)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(whole), weights(first), strict=True))


def test_a_checkpoint_replaces_the_old_one_whole(tmp_path):
    stage = Tiny()
    loop.train(stage, 1, tmp_path)
    assert [path.name for path in (tmp_path / "text").iterdir()] == ["checkpoint.safetensors"]
    assert loop.read_progress(tmp_path / "text").samples == 2
