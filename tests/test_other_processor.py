"""The tests' other processor shows what claims equal bits of unlike things."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from personalize_core.artifacts import saving
from personalize_core.sampling import sampler
from tests.conftest import disturbed, equal_bits, sample_latents
from tests.every_method.cases import Case
from tests.other_processor import other_processor


@pytest.mark.parametrize("name", ["dreambooth", "ti_db", "attn_dreambooth", "core"])
def test_not_frozen_a_trained_method_samples_otherwise_than_its_restored_copy(name, concept, tmp_path, monkeypatch):
    """Their tensors are equal; only what was just trained still has requires_grad set."""
    case = Case(name, "linear")
    base = case.base()
    method = disturbed(case.make(base, concept)).eval()
    saving.save(tmp_path, name, method, base, seed=0)
    restored = saving.restore(tmp_path, base)
    assert equal_bits(method.state_dict(), restored.state_dict())
    prompts = [method.say("a photo of {}"), "a red mug"]
    with other_processor("requires_grad"):
        expected = sample_latents(restored, base, prompts)
        assert torch.equal(sample_latents(method, base, prompts), expected)
        monkeypatch.setattr(sampler, "frozen", nullcontext)
        trained = sample_latents(method, base, prompts)
    torch.testing.assert_close(trained, expected, atol=1e-2, rtol=1e-3)
    assert not torch.equal(trained, expected)


def test_a_product_of_one_row_and_of_several_are_told_apart_by_their_rows():
    generator = torch.Generator().manual_seed(0)
    rows, layer = torch.randn(3, 5, generator=generator), torch.nn.Linear(5, 7)
    with other_processor("rows"), torch.no_grad():
        together, alone = layer(rows)[0], layer(rows[:1])[0]
        assert torch.equal(layer(rows)[0], together) and torch.equal(rows @ rows.T, rows @ rows.T)
    assert not torch.equal(together, alone)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
