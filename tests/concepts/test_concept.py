"""A concept's name, placeholder and class noun are plain, and a prompt speaks of it."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from personalize_core.concepts.concept import SLOT, Concept, check_name, check_placeholders, check_read_as_words
from personalize_core.concepts.concept_files import captioned
from personalize_core.concepts.prompt_lists import read_list
from personalize_core.errors import InputError, listed
from tests.conftest import tiny_base


@pytest.mark.parametrize("name", ["dog7", "a", "7", "red_mug-2", "x" * 63])
def test_a_plain_name_is_accepted_and_gives_the_placeholder(name):
    assert Concept.named(name, "dog").placeholder == f"<{name}>"


@pytest.mark.parametrize(
    "name", ["", "Dog", "my dog", "dog/cat", "../dog", ".dog", "-dog", "_dog", "dög", "dog\n", "dog|cat", "x" * 64]
)
def test_a_name_that_cannot_be_a_folder_and_a_key_is_refused_before_anything_else(name):
    with pytest.raises(InputError) as refused:
        Concept.named(name, "dog")
    assert str(refused.value) == (
        f"{name!r} cannot be a concept's name; use 1 to 63 lower-case letters, digits, '-' and '_', "
        "beginning with a letter or digit, such as 'dog7'"
    )
    with pytest.raises(InputError):
        check_name(name)


@pytest.mark.parametrize("noun", ["dog", "stuffed animal", "Teddy", "rock'n'roll star", "a b c d e", "d" * 100])
def test_a_class_noun_is_one_to_five_words(noun):
    assert Concept.named("x", noun).class_noun == noun


@pytest.mark.parametrize(
    "noun",
    ["", " dog", "dog ", "two  spaces", "dog7", "<dog>", "{}", "a b c d e f", "chat,chien", "犬", "d" * 101],
)
def test_any_other_class_noun_is_refused_and_says_how_to_write_one(noun):
    with pytest.raises(InputError, match="concept 'dog7': .* cannot be a class noun; write what kind of thing it is"):
        Concept.named("dog7", noun)


@pytest.mark.parametrize("placeholder", ["dog7", "<Dog>", "<>", "<a b>", "<a><b>", "<dog"])
def test_a_placeholder_is_a_plain_word_in_angle_brackets(placeholder):
    with pytest.raises(InputError, match="concept 'dog7': .* cannot be a placeholder; .* such as '<dog7>'"):
        Concept("dog7", placeholder, "dog")


def test_a_prompt_becomes_a_template_with_or_without_the_class_noun():
    concept = Concept.named("dog7", "dog")
    for prompt in ("a <dog7> on the beach", "a <dog7> dog on the beach"):
        assert concept.template(prompt) == f"a {SLOT} on the beach"
    assert concept.template("<dog7> dog beside <dog7>") == f"{SLOT} beside {SLOT}"


@pytest.mark.parametrize(
    "noun, prompt, template",
    [
        ("dog", "a <x> doghouse", "a {} doghouse"),
        ("car", "<x> cartoon", "{} cartoon"),
        ("cat", "<x> catching a ball", "{} catching a ball"),
        ("dog", "two <x> dogs", "two {} dogs"),
        ("dog", "a <x> dog-house", "a {} dog-house"),
        ("dog", "a <x> Dog, <x> DOG", "a {}, {}"),
        ("Teddy", "a <x> teddy", "a {}"),
        ("dog", "a <x> dog's bowl", "a {}'s bowl"),
        ("dog", "a <x>  dog.", "a {}."),
        ("dog", "a <x> dog doghouse", "a {} doghouse"),
        ("stuffed animal", "a <x> Stuffed animal and <x> stuffed animals", "a {} and {} stuffed animals"),
        ("dog", "a {red} <x> dog", "a {red} {}"),
        ("dog", "a <x> \\1 dog", "a {} \\1 dog"),
    ],
)
def test_the_class_noun_counts_as_a_whole_word_in_capitals_or_not(noun, prompt, template):
    assert Concept("x", "<x>", noun).template(prompt) == template


def test_a_prompt_with_a_slot_of_its_own_is_refused():
    with pytest.raises(InputError, match="has '{}', which stands for the concept in prompt lists"):
        Concept.named("dog7", "dog").template("a {red} <dog7> and a {}")


def test_a_prompt_that_does_not_mention_the_concept_is_refused_with_what_to_write():
    concept = Concept.named("dog7", "dog")
    with pytest.raises(InputError) as refused:
        concept.template("a dog on the beach")
    assert str(refused.value) == (
        "the prompt does not mention the concept 'dog7': 'a dog on the beach'. "
        "Write '<dog7>' where the concept belongs."
    )


def test_a_list_reads_as_a_sentence_does():
    assert (listed("abc"), listed("ab"), listed("a"), listed("")) == ("a, b and c", "a and b", "a", "none")


@pytest.mark.parametrize(
    "line, said",
    [
        ("a {} beside <cup>", "the prompt has '<cup>', which stands for no concept of these images"),
        ("a <rex> on the beach", "must name the concept exactly once"),
    ],
)
def test_a_list_of_prompts_names_concepts_by_the_slot_alone(line, said, tmp_path):
    (tmp_path / "mine.txt").write_text(f"a {{}} in the snow\n{line}\n")
    with pytest.raises(InputError, match=said) as refused:
        read_list(tmp_path / "mine.txt")
    assert str(refused.value).startswith(f"{tmp_path / 'mine.txt'}: ")
    (tmp_path / "mine.txt").write_text("a {} that is <3 years old, and > 1 m\n")  # no placeholder
    assert len(read_list(tmp_path / "mine.txt")) == 1


@pytest.mark.parametrize("mark", ["<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "<end_of_text>"])
def test_a_tokenizers_own_mark_is_no_word_of_a_prompt(mark):
    with pytest.raises(InputError, match=f"^{re.escape(repr(mark))} is no word to a text encoder .* Leave it out"):
        check_placeholders(f"a <dog7>{mark} on the beach", [Concept.named("dog7", "dog")])


def test_every_mark_of_the_base_models_tokenizer_is_known_and_other_brackets_are_words():
    marks = tiny_base().tokenizer._tokenizer.all_special_tokens
    assert {"<|startoftext|>", "<|endoftext|>"} <= {*marks}
    for mark in marks:
        with pytest.raises(InputError, match="is no word"):
            check_read_as_words(f"a dog {mark}")
    check_read_as_words("a < b | c > d, <|, |> and <end>")


def test_a_prompt_list_and_a_caption_with_a_tokenizers_mark_are_refused_by_their_files(tmp_path):
    (tmp_path / "some.txt").write_text("a photo of a {}<|endoftext|> in the snow\n")
    with pytest.raises(InputError, match="some.txt: .* is no word"):
        read_list(tmp_path / "some.txt")
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a dog <|endoftext|> in the snow\n")
    with pytest.raises(InputError, match="0.txt: .* is no word"):
        captioned(tmp_path)
