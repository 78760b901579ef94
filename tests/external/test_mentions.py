"""Prompts of other programs become the templates that ours are."""

import pytest

from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.external.mentions import Mentions

REX = Concept.named("rex", "dog")
BEAR = Concept.named("ted", "stuffed animal")


@pytest.mark.parametrize(
    "prompt",
    [
        "a photo of a <rex> on the beach",
        "a photo of a <rex> dog on the beach",
        "a photo of a sks dog on the beach",
        "a photo of a <new1> dog on the beach",
        "a photo of a V* dog on the beach",
        "a photo of a [V] dog on the beach",
        "a photo of a dog on the beach",
        "a photo of a Dog on the\n beach",
        "a photo of a {} on the beach",
    ],
)
def test_the_usual_ways_to_name_a_concept_are_one_template(prompt):
    assert Mentions(REX).template(prompt) == "a photo of a {} on the beach"


@pytest.mark.parametrize("prompt", ["a photo of a cat", "dogs in the snow", "a doghouse", "a hot-dog", "sks", ""])
def test_a_prompt_without_the_concept_has_no_template(prompt):
    assert Mentions(REX).template(prompt) is None


def test_every_mention_becomes_the_slot():
    assert Mentions(REX).template("sks dog beside another dog") == "{} beside another dog"
    assert Mentions(REX).template("a dog beside a dog") == "a {} beside a {}"


def test_nouns_of_several_words_are_found_whole():
    assert Mentions(BEAR).template("a photo of my Stuffed  Animal") == "a photo of my {}"
    assert Mentions(BEAR).template("an animal, stuffed") is None


def test_a_mention_of_the_users_own_is_the_only_one():
    mentions = Mentions(REX, "ohwx person")
    assert mentions.template("photo of ohwx person with a dog") == "photo of {} with a dog"
    assert mentions.template("photo of a dog") is None
    assert Mentions(REX, "a+b (c)").template("see A+B (c)!") == "see {}!"


@pytest.mark.parametrize("mention", ["", "  ", "my {}"])
def test_a_mention_that_cannot_be_one_is_refused(mention):
    with pytest.raises(InputError, match="cannot stand for the concept"):
        Mentions(REX, mention)
