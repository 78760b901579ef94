"""The base model as a method: it learns nothing, and names the concept by its class noun alone."""

from __future__ import annotations

import pytest
import torch

from personalize_core.errors import InputError
from personalize_core.methods.base_model.method import BaseModelAlone, Config
from personalize_core.training.loop import train
from tests.conftest import sample_latents, unpersonalized


@pytest.fixture
def method(base, concept):
    return BaseModelAlone(Config(), base, concept)


def test_it_names_the_class_noun_and_never_of_the_placeholder(method):
    assert method.say("a photo of a {} on the beach") == "a photo of a dog on the beach"


def test_it_learns_nothing(method, base, images):
    assert list(method.parameters()) == [] and method.stages() == []
    assert train(method, base, images, seed=0) == []


def test_it_samples_as_if_no_method_were_there(method, base, concept):
    prompts = ["a photo of a dog on the beach"]
    assert torch.equal(
        sample_latents(method, base, prompts), sample_latents(unpersonalized(base, concept), base, prompts)
    )


def test_there_is_nothing_to_export(method, base, tmp_path):
    with pytest.raises(InputError, match="there is no public format for what BaseModelAlone learns"):
        method.export(base, tmp_path)
