"""What several methods are made of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from personalize_core.methods.interface import count
from personalize_core.methods.shared.concept_embedding import ConceptEmbedding, drift
from personalize_core.methods.shared.tuned_weights import KeptWeights, TunedWeights, parameter_names


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))).requires_grad_(False)


@pytest.fixture
def tuned(model) -> TunedWeights:
    return TunedWeights(model, parameter_names(model))


x = torch.ones(1, 3)


def test_untouched_copies_compute_what_the_originals_do(model, tuned):
    expected = model(x)
    with tuned.placed_in(model):
        assert torch.equal(model(x), expected)


def test_within_the_block_the_model_computes_with_the_copies(model, tuned):
    for weight in tuned.parameters():
        nn.init.zeros_(weight)
    with tuned.placed_in(model):
        assert not model(x).any()


def test_gradients_reach_the_copies_and_not_the_originals(model, tuned):
    with tuned.placed_in(model):
        model(x).sum().backward()
    assert all(weight.grad is not None for weight in tuned.parameters())
    assert all(original.grad is None for original in model.parameters())


def test_the_originals_come_back_themselves_also_after_a_failure(model, tuned):
    originals = dict(model.named_parameters())
    with pytest.raises(RuntimeError), tuned.placed_in(model):
        raise RuntimeError
    assert all(parameter is originals[name] for name, parameter in model.named_parameters())


def test_copies_nest(model):
    outer, inner = TunedWeights(model, ["0.weight"]), TunedWeights(model, ["0.weight"])
    expected = model(x)
    nn.init.zeros_(inner.weights["0/weight"])
    with outer.placed_in(model):
        with inner.placed_in(model):
            assert not torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)


def test_a_part_of_the_model_can_be_chosen(model):
    tuned = TunedWeights(model, ["1.1.bias"])
    assert [name for name, _ in tuned.items()] == ["1.1.bias"] and count(tuned) == 2


def test_copies_of_a_half_precision_model_are_float32(model):
    tuned = TunedWeights(model.half(), ["0.weight"])
    assert tuned.weights["0/weight"].dtype == torch.float32


def test_the_state_has_the_models_own_names(model, tuned):
    state = tuned.as_state_dict()
    assert sorted(state) == sorted(parameter_names(model))
    model.load_state_dict(state)


def test_an_embedding_starts_from_a_copy_of_its_word():
    word = torch.arange(4.0)
    embedding = ConceptEmbedding(word)
    nn.init.zeros_(embedding.vector)
    assert word.tolist() == [0, 1, 2, 3]
    assert embedding.vector.dtype == torch.float32 and count(embedding) == 4


def test_an_embedding_says_how_long_it_is_and_how_far_from_its_start():
    embedding = ConceptEmbedding(torch.tensor([3.0, 0.0]))
    assert embedding.metrics() == pytest.approx({"v_norm": 3, "v_cosine": 1})
    with torch.no_grad():
        embedding.vector.copy_(torch.tensor([3.0, 4.0]))
    assert embedding.metrics() == pytest.approx({"v_norm": 5, "v_cosine": 0.6})
    assert ConceptEmbedding(torch.ones(2), learned=False).metrics() == {}


def test_of_several_embeddings_the_means_are_said():
    vectors = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert drift(vectors, torch.tensor([2.0, 0.0])) == pytest.approx({"v_norm": 2, "v_cosine": 0.5})


def test_where_an_embedding_started_is_kept_in_no_artifact():
    assert list(ConceptEmbedding(torch.ones(2)).state_dict()) == ["vector"]


# -- weights as they once were ---------------------------------------------------------------------------------


def test_kept_weights_stay_as_they_were_when_they_were_kept(model, tuned):
    kept = KeptWeights(model, ["0.weight", "1.1.bias"])
    nn.init.ones_(tuned.weights["0/weight"])
    kept.keep(tuned)
    with tuned.placed_in(model):
        expected = model(x)
    nn.init.zeros_(tuned.weights["0/weight"])
    originals = dict(model.named_parameters())
    with kept.placed_in(model):
        assert torch.equal(model(x), expected)
    assert all(parameter is originals[name] for name, parameter in model.named_parameters())


def test_kept_weights_are_saved_and_never_trained(model):
    kept = KeptWeights(model, ["0.weight"])
    assert list(kept.parameters()) == [] and list(kept.state_dict()) == ["0/weight"]


# -- beside a model in half precision ----------------------------------------------------------------------------


@pytest.fixture
def half(model) -> nn.Sequential:
    return model.bfloat16()


def test_copies_start_from_the_values_that_were_not_rounded(half):
    exact = {"0.weight": torch.full((4, 3), 1 / 3)}
    names = ["0.weight", "0.bias"]
    tuned, kept = TunedWeights(half, names, exact), KeptWeights(half, names, exact)
    for tensors in (tuned.weights.state_dict(), kept.state_dict()):
        assert torch.equal(tensors["0/weight"], exact["0.weight"])
        assert torch.equal(tensors["0/bias"], half[0].bias.float())


def test_in_training_the_float32_copies_themselves_are_placed(half):
    tuned = TunedWeights(half, ["0.weight"])
    with tuned.train().placed_in(half):
        assert half[0].weight is tuned.weights["0/weight"]


def test_else_matrices_are_placed_in_the_originals_type_and_vectors_in_float32(half):
    tuned = TunedWeights(half, ["0.weight", "0.bias"]).eval().requires_grad_(False)
    with tuned.placed_in(half):
        assert (half[0].weight.dtype, half[0].bias.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(half[0].weight, tuned.weights["0/weight"].bfloat16())


def test_what_is_placed_is_made_once_and_again_after_a_change(half):
    tuned, seen = TunedWeights(half, ["0.weight"]).eval().requires_grad_(False), []
    for change in (0, 0, 1):
        if change:
            tuned.weights["0/weight"].add_(change)
        with tuned.placed_in(half):
            seen.append(half[0].weight)
    assert seen[1] is seen[0]
    assert torch.equal(seen[2], tuned.weights["0/weight"].bfloat16()) and not torch.equal(seen[2], seen[0])


# -- the embedding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [True, False])
def test_an_embedding_reads_as_another_for_a_while(learned):
    embedding, other = ConceptEmbedding(torch.ones(3), learned), torch.zeros(2, 1, 3)
    own = embedding.vector
    with pytest.raises(RuntimeError), embedding.reading(other):
        assert embedding.vector is other
        raise RuntimeError
    assert embedding.vector is own
    assert len(list(embedding.parameters())) == learned and list(embedding.state_dict()) == ["vector"]
