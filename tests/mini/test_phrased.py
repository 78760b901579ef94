"""Names that say what phrases say: no row of the phrase's caption is lost, and the text encoder that ships teaches."""

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModel

from personalize_core.mini import loop, named, phrased, tokenizer, world
from personalize_core.mini.export import WEIGHTS, export
from personalize_core.mini.text import tokens


@pytest.fixture(scope="module")
def words():
    return tokenizer.load()


@pytest.fixture(scope="module")
def made(words):
    """(scene, caption's ids, what is told of it) of many scenes."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(200):
        scene = phrased.random_scene(rng)
        phrases = phrased.phrases_of(scene, rng)
        ids = tokens(words, [world.caption(scene, rng, phrases)])[0].tolist()
        rows.append((scene, ids, phrased.told(ids, scene, phrases, words, rng)))
    return rows


def test_some_names_say_a_category_alone_and_the_others_colours(made):
    said = [name.parts for _, _, told in made for name in told.names]
    assert set(said) == {frozenset(), phrased.SAID}
    assert 0.1 < np.mean([not parts for parts in said]) < 0.4


def test_every_row_of_the_phrases_caption_is_asked_for_once(made):
    for _, ids, told in made:
        assert sorted(told.rows) == list(range(len(ids))) and len(told.ids) == len(ids)


def test_words_stay_under_their_rows_and_a_name_stands_on_its_noun(made, words):
    nouns = {named.word_id(words, category): category for category in named.CATEGORIES}
    rare, seen = named.word_id(words, tokenizer.RARE_TOKEN), 0
    for _, ids, told in made:
        names = iter(told.names)
        end = told.ids.index(words.eos_token_id)
        for place in range(end + 1):
            row = told.rows[place]
            if told.ids[place] != rare:
                assert told.ids[place] == ids[row]
                continue
            name = next(names)
            if told.ids[place + 1] not in nouns:
                assert nouns[ids[row]] == name.thing.category and name.category
            seen += 1
        assert next(names, None) is None
    assert seen > 100


def test_the_missing_words_go_to_the_last_places_each_things_to_its_own(words):
    design = world.Design("bear-flat", ("red", "blue"), "halves")
    pose = world.random_pose(np.random.default_rng(0))
    scene = world.Scene("bear", design, pose, "", "photo", 0, world.Thing("cat", design, pose))
    ids = tokens(words, ["a photo of a red and blue bear next to a red and blue cat"])[0].tolist()
    rng: Any = type("Always", (), {"random": lambda self: 0.0})()
    told = phrased.told(ids, scene, ["red and blue bear", "red and blue cat"], words, rng)
    assert words.decode([ids[row] for row in told.rows[-6:]]) == "red and blue red and blue"
    second = phrased.find(ids, ids[5:8], 8)  # where the cat's phrase begins
    assert told.rows[-3:] == [5, 6, 7] and told.rows[-6:-3] == [second, second + 1, second + 2]
    assert words.decode(told.ids, skip_special_tokens=True) == "a photo of a sks next to a sks"


def test_no_design_that_is_reserved_is_named(made):
    assert not any(named.reserved(t.category, t.design) for scene, _, _ in made for t in scene.things)


def test_before_training_captions_without_names_are_read_as_by_the_weights_that_ship_and_training_brings_names_near(
    tmp_path,
):
    stage = phrased.Phrased(batch=8)
    rng = np.random.default_rng(1)
    ids = tokens(stage.words, ["a photo of a red and blue bear", ""])
    same = [phrased.unnamed(row) for row in ids.tolist()]
    assert stage.error(same, stage.speaker, rng) < 1e-9
    before = stage.look(tmp_path, 0)
    loop.train(stage, 40, tmp_path, look_every=1000)
    after = stage.look(tmp_path, 0)
    assert float(after.split()[3].rstrip(",")) < float(before.split()[3].rstrip(","))
    assert all(torch.isfinite(p).all() for p in stage.text_average.parameters())


def told_of(stage, phrase):
    """Of a bear on a plain backdrop, called by a name alone, that says what the phrase says."""
    design = world.Design("bear-flat", ("red", "blue"), "halves")
    scene = world.Scene("bear", design, world.random_pose(np.random.default_rng(0)), "", "photo", 0)
    ids = tokens(stage.words, [f"a photo of a {phrase}"])[0].tolist()
    always: Any = type("Always", (), {"random": lambda self: 0.0})()
    return phrased.told(ids, scene, [phrase], stage.words, always)


def test_names_and_what_they_are_read_as_are_mixed_each_by_its_own_share(monkeypatch):
    monkeypatch.setattr(phrased, "NOISE", 0.0)
    stage, rng = phrased.Phrased(batch=1), np.random.default_rng(0)
    second_colours: Any = stage.composer.parts["second colour"]
    torch.nn.init.normal_(second_colours.weight, std=0.1)
    full, noun = told_of(stage, "red and blue bear"), told_of(stage, "bear")
    assert full.ids == noun.ids

    with torch.no_grad():
        found = stage.error([full], stage.speaker, rng, [noun], [0.3], [0.4])

        def rows(told):
            return stage.teacher(torch.tensor([told.phrased])).last_hidden_state[0][told.rows]

        target = 0.6 * rows(full) + 0.4 * rows(noun)
        first, second = (stage.speaker.vectors(told.names)[0] for told in (full, noun))
        embeddings: Any = stage.text.get_input_embeddings()
        embeddings.weight.data = table = torch.cat([embeddings.weight, (0.7 * first + 0.3 * second)[None]])
        rare = named.word_id(stage.words, tokenizer.RARE_TOKEN)
        ids = torch.tensor([[len(table) - 1 if token == rare else token for token in full.ids]])
        error = ((stage.text(ids).last_hidden_state[0] - target) ** 2).mean(dim=1)
    end = full.ids.index(stage.words.eos_token_id)
    padding, words, holes = error[end + 1 :], error[: end + 1], error[-3:]
    assert float(found) == pytest.approx(float(padding.mean() + words.mean() + holes.mean()) / 3, rel=1e-5)


def test_captions_that_differ_in_more_than_their_names_are_not_mixed(monkeypatch):
    monkeypatch.setattr(phrased, "NOISE", 0.0)
    stage, rng = phrased.Phrased(batch=1), np.random.default_rng(0)
    bear, other = told_of(stage, "red and blue bear"), tokens(stage.words, ["a bear"])[0].tolist()
    with torch.no_grad():
        alone = stage.error([bear], stage.speaker, rng)
        beside = stage.error([bear], stage.speaker, rng, [phrased.unnamed(other)], [0.5], [0.5])
    assert torch.equal(alone, beside)


def test_others_keep_place_and_number_of_things():
    rng = np.random.default_rng(3)
    for _ in range(100):
        scene = phrased.random_scene(rng)
        other = phrased.other_things(scene, rng)
        assert (other.place, len(other.things)) == (scene.place, len(scene.things))
        assert not any(named.reserved(thing.category, thing.design) for thing in other.things)
        assert all(thing.design != kept.design for thing, kept in zip(other.things, scene.things, strict=True))


def test_the_text_encoder_that_names_were_taught_with_is_exported_alone(tmp_path):
    stage = phrased.Phrased(batch=2)
    loop.train(stage, 2, tmp_path)
    export(tmp_path, tmp_path / "weights", ["text"])
    folder = tmp_path / "weights" / "base" / "text_encoder"
    shipped = load_file(WEIGHTS / "base" / "text_encoder" / "model.safetensors")
    written = load_file(folder / "model.safetensors")
    assert {key: value.shape for key, value in written.items()} == {key: value.shape for key, value in shipped.items()}
    loaded: Any = CLIPTextModel.from_pretrained(folder, dtype=torch.float32)
    own = stage.text_average.module.half().float().state_dict()
    assert all(torch.equal(value, own[key]) for key, value in loaded.state_dict().items())
