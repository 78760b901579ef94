"""Whatever a method learned, the base model comes out as it went in, and what was saved comes back.

No test here knows a method's name.
"""

from __future__ import annotations

import pytest
import torch

from personalize_core.artifacts import saving
from personalize_core.errors import InputError
from personalize_core.files.atomic import read_json
from personalize_core.methods.interface import count
from tests.conftest import disturbed, equal_bits, predict, sample_latents, snapshot
from tests.every_method.cases import CutOff, of_all, of_default


@of_all
def test_leaving_attach_restores_the_base_model_whatever_was_learned(case, base, concept):
    context = base.encode(["a photo of dog", "a dog in the desert"], concept)
    expected, before = predict(base, context), snapshot(base)
    with disturbed(case.make(base, concept)).attach(base):
        pass
    assert torch.equal(predict(base, context), expected)
    assert equal_bits(snapshot(base), before)


@of_all
def test_the_base_model_is_restored_when_the_block_fails(case, base, concept):
    context = base.encode(["a photo of dog"], concept)
    expected, before = predict(base, context), snapshot(base)
    with pytest.raises(CutOff), disturbed(case.make(base, concept)).attach(base):
        raise CutOff
    assert torch.equal(predict(base, context), expected)
    assert equal_bits(snapshot(base), before)


@of_all
def test_saved_and_restored_it_samples_the_same_image(case, base, concept, tmp_path):
    method = disturbed(case.make(base, concept))
    saving.save(tmp_path, case.name, method, base, seed=0)
    state = torch.random.get_rng_state()
    restored = saving.restore(tmp_path, base)
    assert torch.equal(torch.random.get_rng_state(), state)  # it started from nothing at random
    tensors = [*restored.parameters(), *restored.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    prompts = [method.say("a photo of {}"), "a red mug"]
    assert torch.equal(sample_latents(restored, base, prompts, steps=1), sample_latents(method, base, prompts, steps=1))
    assert restored.config == method.config and restored.concept == method.concept
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


@of_all
def test_the_count_of_what_is_learned_is_the_artifacts(case, base, concept, tmp_path):
    method = case.make(base, concept)
    saving.save(tmp_path, case.name, method, base, seed=0)
    assert read_json(tmp_path / "config.json")["parameters"] == count(method)
    remembered = {name for name, _ in method.named_buffers()}
    assert count(method) == sum(t.numel() for name, t in method.state_dict().items() if name not in remembered)


@of_all
def test_a_method_is_exported_in_a_public_format_or_refuses_and_writes_nothing(case, base, concept, tmp_path):
    method = case.make(base, concept)
    try:
        how = method.export(base, tmp_path)
    except InputError as refusal:
        assert "cannot be exported" in str(refusal)
        assert list(tmp_path.iterdir()) == []
    else:
        assert list(tmp_path.rglob("*.safetensors"))
        assert method.say("{}") in how or base.tokenizer.rare_word in how


@of_default
def test_a_method_says_the_concept_in_a_way_that_the_tokenizer_finds(case, base, concept):
    method = case.make(base, concept)
    context = method.condition(base, [method.say("a photo of {} on the beach")])(torch.tensor([500]))
    assert context.concept.any()
    assert len(context) == 1
