"""Names: what they say, how they are composed and read, and which designs are kept for the gates."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from personalize_core.mini import autoencoder, concepts, loop, named, phrased, tokenizer, world
from personalize_core.mini.export import WEIGHTS
from personalize_core.mini.named import PARTS, Composer, Name, Speaker
from personalize_core.mini.networks import TEXT_WIDTH, text_encoder
from personalize_core.mini.text import IGNORED, tokens


@pytest.fixture(scope="module")
def words():
    return tokenizer.load()


@pytest.fixture(scope="module")
def speaker(words):
    torch.manual_seed(0)
    composer = Composer()
    for weight in composer.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    return Speaker(words, text_encoder(len(words), words.eos_token_id).eval(), composer)


def test_a_name_says_nothing_of_what_was_never_taught(words):
    torch.manual_seed(0)
    untaught = Speaker(words, text_encoder(len(words), words.eos_token_id), Composer())
    table = untaught.text_encoder.get_input_embeddings().weight
    assert torch.equal(untaught.vectors([Name(thing())])[0], table[named.word_id(words, "bear")])


def thing(category="bear", **design: Any) -> world.Thing:
    said: dict[str, Any] = {"colours": ("red", "blue"), "layout": "halves", "mark": "star"} | design
    return world.Thing(category, world.Design("bear-flat", **said), world.random_pose(np.random.default_rng(0)))


def test_the_noun_is_the_mean_of_its_names_over_each_part(speaker):
    noun = speaker.text_encoder.get_input_embeddings().weight[named.word_id(speaker.words, "bear")]
    first = [Name(thing(colours=(colour, "red")), parts=frozenset({"first colour"})) for colour in named.COLOURED]
    marks = [Name(thing(mark=mark), parts=frozenset({"mark"})) for mark in PARTS["mark"]]
    for names in (first, marks):
        vectors = speaker.vectors(names)
        assert (vectors - noun).norm(dim=1).min() > 0.1
        torch.testing.assert_close(vectors.mean(dim=0), noun, atol=1e-6, rtol=0)


def test_no_training_scene_shows_a_design_that_is_reserved_and_the_concepts_are():
    scenes = [named.scene_of(0, number) for number in range(400)]
    assert not any(named.reserved(t.category, t.design) for scene in scenes for t in scene.things)
    for name, design in concepts.DESIGNS.items():
        for colours in (design.colours, design.colours[::-1]):
            other = replace(design, sprite="any", colours=colours, mark=None, layout="stripes")
            assert named.reserved(concepts.category(name), other)
    rng = np.random.default_rng(1)
    fresh = [world.random_scene(rng, plain=0) for _ in range(2000)]
    assert np.mean([named.reserved(s.category, s.design) for s in fresh]) == pytest.approx(1 / 11, abs=0.03)
    assert not named.reserved("bear", world.Design("bear-flat", ("red", "red")))


def test_scenes_are_drawn_again_from_their_number_and_some_of_them_bend_more_sprites():
    scenes = [named.scene_of(0, number) for number in range(200)]
    assert scenes == [named.scene_of(0, number) for number in range(200)]
    own = [scene for number, scene in enumerate(scenes) if named.may_be_named(number)]
    assert len(own) == 200 * named.WITH_NAMES // 20
    sprites = {scene.design.sprite for scene in own}
    assert sprites & {sprite for drawn in named.MORE_VARIANTS.values() for sprite in drawn}
    others = [scene for number, scene in enumerate(scenes) if not named.may_be_named(number)]
    assert any(any(scene.design.shape) for scene in own)
    assert not any(any(scene.design.shape) for scene in others)


def test_a_name_of_which_nothing_is_said_is_its_categorys_word(speaker, words):
    table = speaker.text_encoder.get_input_embeddings().weight
    vector = speaker.vectors([Name(thing(), parts=frozenset())])[0]
    assert torch.equal(vector, table[named.word_id(words, "bear")])
    without = speaker.vectors([Name(thing(), category=False, parts=frozenset())])[0]
    assert torch.equal(without, speaker.composer.no_category)


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("first colour", {"colours": ("pink", "blue")}),
        ("second colour", {"colours": ("red", "pink")}),
        ("layout", {"layout": "sides"}),
        ("mark", {"mark": "ring"}),
        ("mark's colour", {"mark_colour": "pink"}),
        ("sprite", {"shape": (0.1, 0.0, 0.0)}),
    ],
)
def test_a_part_changes_a_name_unless_it_is_left_unsaid(speaker, part, other):
    one, two = thing(), thing(**other)
    whole = speaker.vectors([Name(one), Name(two)])
    assert not torch.allclose(whole[0], whole[1])
    less = frozenset(PARTS) - {part}
    vague = speaker.vectors([Name(one, parts=less), Name(two, parts=less)])
    assert torch.equal(vague[0], vague[1])


def test_a_plain_thing_has_no_second_colour_and_one_without_a_mark_no_marks_colour():
    rows = Name(thing(layout="plain", colours=("red", "red"), mark=None)).rows()
    assert rows["second colour"] == rows["mark's colour"] == -1
    assert rows["first colour"] >= 0 and PARTS["mark"][rows["mark"]] is None


def test_an_embedding_in_the_rare_words_place_is_read_as_the_word_whose_it_is(speaker, words):
    table = speaker.text_encoder.get_input_embeddings().weight
    vectors = table[[named.word_id(words, word) for word in ("dog", "bear", "cat")]]
    with torch.no_grad():
        read = speaker.read(["a photo of a sks next to a sks", "a sks on the beach"], vectors)
        expected = speaker.text_encoder(
            tokens(words, ["a photo of a dog next to a bear", "a cat on the beach"])
        ).last_hidden_state
    assert torch.allclose(read, expected, atol=1e-6)
    assert len(speaker.text_encoder.get_input_embeddings().weight) == len(table)


def test_gradients_reach_names_and_the_words_they_are_made_of(speaker):
    speaker.read(["a photo of a sks"], speaker.vectors([Name(thing())])).sum().backward()
    parts: Any = speaker.composer.parts
    assert parts["mark"].weight.grad[PARTS["mark"].index("star")].any()
    assert speaker.text_encoder.get_input_embeddings().weight.grad[speaker.nouns].any()


def test_captions_have_a_rare_word_for_each_name_in_the_order_of_things():
    rng, seen = np.random.default_rng(2), 0
    for number in range(200):
        scene = named.nameable_scene(rng)
        caption, names = named.called(scene, np.random.default_rng(number))
        assert caption.split().count(tokenizer.RARE_TOKEN) == len(names)
        assert [name.thing for name in names] == [t for t in scene.things if any(t is n.thing for n in names)]
        for name in names:
            assert name.category or f"{tokenizer.RARE_TOKEN} {name.thing.category}" in caption
        seen += len(names)
    assert seen > 100


def test_some_names_say_all_and_some_less():
    rng = np.random.default_rng(3)
    said = [len(named.random_name(rng, thing(), True).parts) for _ in range(400)]
    assert np.mean([count == len(PARTS) for count in said]) == pytest.approx(0.5 + 0.5 * 0.6**3, abs=0.06)
    assert min(said) == 0


@pytest.mark.parametrize("aspect", named.SWAPS)
def test_a_swapped_name_differs_in_the_one_thing(aspect):
    rng = np.random.default_rng(4)
    for scene in named.judged_names(10):
        other = named.with_another(scene, aspect, rng)
        rows, changed = Name(scene).rows(), Name(other).rows()
        differing = {part for part in PARTS if rows[part] != changed[part]}
        assert differing == (set() if aspect == "category" else {aspect})
        assert (scene.category != other.category) == (aspect == "category")


def test_judged_names_are_of_reserved_designs_with_a_mark():
    scenes = named.judged_names(10)
    assert all(named.reserved(scene.category, scene.design) and scene.design.mark for scene in scenes)
    assert all(scene.place and scene.style == "photo" for scene in scenes)
    assert scenes == named.judged_names(10)


def test_what_is_read_back_is_what_was_said():
    full, vague = Name(thing()), Name(thing(), parts=frozenset({"mark", "mark's colour"}))
    truth = named.said_by_names([[full], [vague], []])
    assert truth["first colour"].tolist() == [PARTS["first colour"].index("red"), IGNORED, IGNORED]
    assert truth["mark"].tolist() == [PARTS["mark"].index("star")] * 2 + [IGNORED]
    scene = named.judged_names(1)[0]
    words = named.said_by_words([scene] * 3, ["a sks", "a red bear", ""], [[full], [], []], [True, True, False])
    assert words["colour"][0] == words["colour"][2] == words["category"][2] == IGNORED
    assert words["colour"][1] != IGNORED and words["category"][0] != IGNORED


def test_the_stage_starts_from_the_weights_that_ship_and_goes_on_where_it_was(tmp_path):
    autoencoder.shipped().save_pretrained(tmp_path / "vae")

    def stage() -> Any:
        return named.Named(batch=2, work=tmp_path, scenes=8)

    first = stage()
    shipped = loop.load_file(WEIGHTS / "base" / "text_encoder" / "model.safetensors")
    shipped = {key.removeprefix("text_model."): value.float() for key, value in shipped.items()}
    own = {key.removeprefix("text_model."): value for key, value in first.text.state_dict().items()}
    assert all(torch.equal(own[key], value) for key, value in shipped.items() if key in own) and set(shipped) & set(own)
    before = first.composer.parts["sprite"].weight.clone()
    loop.train(first, 2, tmp_path / "once")
    assert not torch.equal(first.composer.parts["sprite"].weight, before)
    loop.train(stage(), 2, tmp_path / "twice", until=1)
    second = stage()
    loop.train(second, 2, tmp_path / "twice")
    for a, b in zip(first.modules.values(), second.modules.values(), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert first.composer.bend.weight.shape == (TEXT_WIDTH, len(named.BEND))


def test_the_stage_goes_on_from_names_that_say_what_phrases_say(tmp_path):
    autoencoder.shipped().save_pretrained(tmp_path / "vae")
    taught = phrased.Phrased(batch=2)
    loop.train(taught, 2, tmp_path)
    stage: Any = named.Named(batch=2, work=tmp_path, scenes=8)
    for module, average, expected in (
        (stage.text, stage.text_average, taught.text_average),
        (stage.composer, stage.composer_average, taught.composer_average),
    ):
        for own in (module, average.module):
            pairs = zip(own.state_dict().values(), expected.module.state_dict().values(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
