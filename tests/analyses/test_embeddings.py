"""What the placeholder reads, what it is near to, and what it does to other words: against NumPy and the parts' own."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from personalize_core.analyses import bare_placeholder, context_tokens, embedding_drift, learned_embedding
from personalize_core.analyses.findings import NotDefined
from personalize_core.base_model.hooks import hooked
from personalize_core.concepts.concept import Concept
from personalize_core.methods import METHOD_NAMES
from personalize_core.methods.base_model.method import BaseModelAlone
from personalize_core.methods.base_model.method import Config as NoConfig
from personalize_core.methods.textual_inversion.method import Config, TextualInversion
from personalize_core.methods.ti_db.method import TIDB
from personalize_core.methods.ti_db.method import Config as TIDBConfig
from personalize_core.methods.xti.method import XTI
from personalize_core.methods.xti.method import Config as XTIConfig
from personalize_core.sampling.sampler import initial_noise, make_sampler, sample
from tests.conftest import LAYERS, disturbed, tiny_base
from tests.every_method.cases import Case

EMBEDDING = {
    *("textual_inversion", "custom_diffusion", "ti_db", "neti", "attn_dreambooth", "vico", "core", "xti"),
    *("dti", "dco", "class_diffusion"),
}


@pytest.fixture
def method(base, concept):
    return disturbed(TextualInversion(Config(), base, concept), seed=2).eval()


# What is read


def test_what_is_read_for_the_placeholder_is_the_embedding(method, base, concept):
    read = learned_embedding.what_is_read(method, base)
    assert read.shape == (1, 32)
    torch.testing.assert_close(read[0], method.embedding.vector, atol=1e-5, rtol=1e-5)
    per_layer = disturbed(XTI(XTIConfig(), base, concept)).eval()
    torch.testing.assert_close(
        learned_embedding.what_is_read(per_layer, base), per_layer.embeddings, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_drift_is_defined_for_the_methods_that_learn_an_embedding_and_for_no_other(name, concept):
    case = Case(name, "convolutional")
    base = case.base()
    start = case.make(base, concept).eval()
    trained = disturbed(copy.deepcopy(start))
    if name in EMBEDDING:
        before, after = learned_embedding.both_ends(start, trained, base)
        assert before.shape == after.shape and len(before) in (1, len(LAYERS))
        assert np.isfinite(before).all() and (np.abs(before - after).max(axis=1) > 1e-3).all()
    else:
        named = start.concept.placeholder in start.phrase
        with pytest.raises(NotDefined, match="learns no embedding" if named else "no placeholder"):
            learned_embedding.both_ends(start, trained, base)


# What it is near to


def test_the_nearest_words_are_those_of_a_loop():
    random = np.random.default_rng(0)
    vectors, table = random.normal(size=(3, 5)), random.normal(size=(9, 5))
    words = [f"w{n}" for n in range(9)]
    for vector, found in zip(vectors, learned_embedding.nearest_words(vectors, table, words, 4), strict=True):
        cosines = []
        for word, row in zip(words, table, strict=True):
            dot = sum(a * b for a, b in zip(vector, row, strict=True))
            cosines.append((dot / math.sqrt(sum(a * a for a in vector) * sum(b * b for b in row)), word))
        expected = sorted(cosines, reverse=True)[:4]
        assert [word for word, _ in found] == [word for _, word in expected]
        assert [cosine for _, cosine in found] == pytest.approx([cosine for cosine, _ in expected])


def test_a_word_is_nearest_to_itself_and_placeholder_and_pieces_are_no_words(base):
    words, table = learned_embedding.vocabulary(base)
    assert {"dog", "desert", "sks"} < set(words) and all(word.isalpha() for word in words)
    (found,) = learned_embedding.nearest_words(base.word_embedding("dog").double().numpy()[None], table, words)
    assert found[0] == ("dog", pytest.approx(1.0))


def test_the_steps_are_the_logs_with_the_norm_as_a_ratio():
    log = [
        {"stage": "embedding", "step": 0, "diffusion": 0.3, "learned": {"v_norm": 3.0, "v_cosine": 0.9}},
        {"stage": "unet", "step": 0, "diffusion": 0.3},
        {"stage": "unet", "step": 1, "diffusion": 0.3, "learned": {"v_norm": 1.0, "v_cosine": 0.5}},
    ]
    first, second = embedding_drift.steps(log, 2.0)
    assert first == {"step": 0, "stage": "embedding", "cosine": 0.9, "norm_ratio": 1.5}
    assert second == {"step": 2, "stage": "unet", "cosine": 0.5, "norm_ratio": 0.5}
    assert embedding_drift.steps([{"stage": "unet", "step": 0}], 2.0) == []


# While it is trained


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_look_finds_what_both_ends_would_and_leaves_the_training_as_it_was(name, concept):
    case = Case(name, "convolutional")
    base = case.base()
    start = case.make(base, concept)
    look = learned_embedding.WhileTraining(start, base, total=40)
    trained = look.method = disturbed(copy.deepcopy(start)).train()
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    random = torch.get_rng_state()
    with trained.attach(base):
        found = look(2)
        assert look(3) is None and (look(40) is None) == (name not in EMBEDDING), (
            "every second step of 40, and the last"
        )
    assert trained.training and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())
    if name not in EMBEDDING:
        assert found is None
        return
    assert found
    one, other = learned_embedding.both_ends(start.eval(), trained.eval(), base)
    assert found["cosine"] == pytest.approx(embedding_drift.cosines(one, other).diagonal().mean(), abs=1e-5)
    norms = np.linalg.norm(other, axis=1) / np.linalg.norm(one, axis=1)
    assert found["norm_ratio"] == pytest.approx(norms.mean(), abs=1e-5)
    words, table = learned_embedding.vocabulary(base)
    for mine, expected in zip(found["near"], learned_embedding.nearest_words(other, table, words), strict=True):
        assert dict(mine) == pytest.approx(dict(expected), abs=1e-5)


def test_the_words_of_the_log_become_rows_and_a_image(tmp_path):
    near = [[("dog", 0.9), ("cat", 0.5)], [("cat", 0.8), ("fox", 0.7)]]
    log = [
        {"stage": "all", "step": n, "learned": {"read": {"cosine": 0.9, "norm_ratio": 1.1, "near": [near[n // 2]]}}}
        if n % 2
        else {"stage": "all", "step": n}
        for n in range(4)
    ]
    rows = embedding_drift.words_during(log, LAYERS)
    assert [(row["step"], row["rank"], row["word"], row["cosine"]) for row in rows] == [
        (1, 1, "dog", 0.9), (1, 2, "cat", 0.5), (3, 1, "cat", 0.8), (3, 2, "fox", 0.7),
    ]  # fmt: skip
    assert all(set(row) == set(embedding_drift.DURING_MEANINGS) and row["layer"] is None for row in rows)
    embedding_drift.plot_words(rows, tmp_path / "words.png", "<rex>")
    assert (tmp_path / "words.png").stat().st_size > 5000
    layered = [{"stage": "all", "learned": {"read": {"cosine": 0.9, "norm_ratio": 1.1, "near": [near[0]] * 4}}}]
    assert len({row["layer"] for row in embedding_drift.words_during(layered, LAYERS)}) == 4


# The bare placeholder


def test_the_bare_placeholder_is_sampled_by_the_base_models_own_u_net(concept):
    """As Textual Inversion with the same embedding samples it, whatever the method changed in the U-Net."""
    base = tiny_base()
    tuned = disturbed(TIDB(TIDBConfig(), base, concept)).eval()
    alone = TextualInversion(Config(), base, concept).eval()
    alone.embedding.vector.data.copy_(tuned.embedding.vector)
    noise, sampler = initial_noise(base, 0, [(0, 0), (0, 1)]), make_sampler("ddim", base)
    bare = bare_placeholder.with_base_unet(tuned, base, noise, sampler, 2, 3.0)
    assert torch.equal(bare, sample(alone, base, ["<v>"] * 2, noise, sampler, 2, 3.0))
    assert not torch.allclose(bare, sample(tuned, base, ["<v>"] * 2, noise, sampler, 2, 3.0), atol=1e-3)


# Context tokens


def test_context_words_are_compared_place_by_place_however_long_the_filler(method, base, concept):
    """A second implementation: the text encoder's output taken by a hook, positions counted by hand."""
    seen = []

    def keep(module, args, answer):
        seen.append(answer.last_hidden_state.double().numpy())

    bear = Concept("v", "<v>", "teddy bear")
    with hooked(base.text_encoders["text_encoder"].register_forward_hook(keep)):
        reference = context_tokens.of_noun(base, "teddy bear", bear)  # <start> teddy bear in the desert <end>
        concept_too = context_tokens.of_concept(method, base, 500)  # <start> <v> in the desert <end>
    assert context_tokens.words(base, bear) == ["in", "the", "desert", context_tokens.END]
    two_words, one_word = seen[0][0, [3, 4, 5, 6]], seen[-1][0, [2, 3, 4, 5]]
    assert np.allclose(reference[0], two_words) and np.allclose(concept_too[0], one_word)
    expected = [float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)) for a, b in zip(one_word, two_words, strict=True)]
    assert context_tokens.cosines(concept_too, reference) == pytest.approx(expected)


def test_the_class_noun_itself_bends_no_word(base, concept):
    reference = context_tokens.of_noun(base, "dog", concept)
    assert context_tokens.cosines(reference, reference) == pytest.approx([1.0] * 4)
    started = TextualInversion(Config(), base, concept).eval()  # from the class noun's own embedding
    assert context_tokens.cosines(context_tokens.of_concept(started, base, 500), reference) == pytest.approx([1.0] * 4)


def test_of_a_text_for_each_layer_the_mean_is_taken(base, concept):
    per_layer = disturbed(XTI(XTIConfig(), base, concept)).eval()
    outputs, reference = context_tokens.of_concept(per_layer, base, 500), context_tokens.of_noun(base, "dog", concept)
    assert outputs.shape == (len(LAYERS), 4, 32)
    layer_by_layer = [context_tokens.cosines(layer[None], reference) for layer in outputs]
    assert np.allclose(context_tokens.cosines(outputs, reference), np.mean(layer_by_layer, axis=0))


def test_the_near_nouns_are_the_nearest_of_the_list_and_never_the_class_noun(base):
    nouns = ["dog", "teddy", "mug", "beach", "desert", "bear"]

    def end(noun: str) -> np.ndarray:
        context = base.encode([f"a photo of a {noun}"])
        place = int(context.end[0].int().argmax())
        vector = context.hidden[0, place].detach().double().numpy()
        return vector / np.linalg.norm(vector)

    cosines = sorted(((float(end("dog") @ end(noun)), noun) for noun in nouns if noun != "dog"), reverse=True)
    found = context_tokens.others(base, "dog", nouns)
    assert found == [
        (cosines[0][1], "near noun"),
        (cosines[1][1], "near noun"),
        (cosines[-1][1], "far noun"),
    ]


def test_the_base_model_has_no_placeholder_to_compare(base, concept):
    alone = BaseModelAlone(NoConfig(), base, concept).eval()
    with pytest.raises(NotDefined, match="class noun alone"):
        context_tokens.of_concept(alone, base, 500)
