"""A copy of the tiny base model is as good as one that was built."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from personalize_core.base_model.model import BaseModel
from tests.conftest import equal_bits, predict, snapshot, tiny_base, tiny_parts
from tests.copies import ALIGNED, Copies


@pytest.mark.parametrize("linear", [False, True])
def test_a_copy_of_the_base_model_computes_what_a_built_one_does(linear, concept):
    built = BaseModel(name="tiny", revision="local", weights_hash="tiny", **tiny_parts(linear))
    copy = tiny_base(linear)
    assert equal_bits(snapshot(copy), snapshot(built))
    prompts = ["a photo of <v> dog", "a red mug"]
    assert torch.equal(predict(copy, copy.encode(prompts, concept)), predict(built, built.encode(prompts, concept)))
    assert not any(parameter.requires_grad for parameter in copy.unet.parameters())


def test_copies_share_no_tensor_and_keep_what_one_value_shares():
    value = nn.ModuleDict({"one": nn.Linear(3, 5), "other": nn.Linear(2, 2, dtype=torch.bfloat16)})
    value["tied"] = value["one"]
    value.register_buffer("number", torch.tensor(3))
    expected = {name: tensor.clone() for name, tensor in value.state_dict().items()}
    copies = Copies(value)
    first, second = copies(), copies()
    assert first["tied"] is first["one"] and first["one"].weight.requires_grad
    assert all(parameter.data_ptr() % (4 * ALIGNED) == 0 for parameter in first.parameters())
    for changed in (value, first):
        with torch.no_grad():
            for tensor in changed.state_dict().values():
                tensor.zero_()
    assert equal_bits(second.state_dict(), expected) and equal_bits(copies().state_dict(), expected)
