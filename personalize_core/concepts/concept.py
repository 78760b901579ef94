"""A concept: the thing that the user wants to see in new images."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from personalize_core.errors import InputError, listed, shown

SLOT = "{}"  # where a prompt template names the concept

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")  # also safe as a folder name and as a partition key
_PLACEHOLDER = re.compile(r"<[a-z0-9][a-z0-9_-]{0,62}>")
_CLASS_NOUN = re.compile(r"[A-Za-z][A-Za-z'-]*( [A-Za-z][A-Za-z'-]*){0,4}")
_MOST_LETTERS = 100  # of a class noun
_MARK = re.compile(r"<\|(start|end)oftext\|>|<(start|end)_of_text>", re.IGNORECASE)  # of CLIP's two tokenizers


@dataclass(frozen=True)
class Concept:
    """One thing that the user wants to see in new images."""

    name: str  # folder name and partition key, e.g. "dog7"
    placeholder: str  # stands for the concept in prompts, e.g. "<dog7>"; V* in the papers
    class_noun: str  # what kind of thing it is, e.g. "dog"; the papers' macro class or super-category

    def __post_init__(self) -> None:
        check_name(self.name)
        if not _PLACEHOLDER.fullmatch(self.placeholder):
            raise InputError(
                f"concept {self.name!r}: {shown(self.placeholder)} cannot be a placeholder; write a plain lower-case "
                f"word in angle brackets, such as '<{self.name}>'"
            )
        if len(self.class_noun) > _MOST_LETTERS or not _CLASS_NOUN.fullmatch(self.class_noun):
            raise InputError(
                f"concept {self.name!r}: {shown(self.class_noun)} cannot be a class noun; write what kind of thing it "
                f"is in one to five English words, together at most {_MOST_LETTERS} letters, such as 'dog' or "
                "'stuffed animal'"
            )

    @classmethod
    def named(cls, name: str, class_noun: str) -> Concept:
        """The concept with the placeholder that follows from its name."""
        check_name(name)
        return cls(name, f"<{name}>", class_noun)

    @property
    def mention(self) -> re.Pattern[str]:
        """The placeholder, and the class noun where it follows as a whole word."""
        noun = r"\s+".join(map(re.escape, self.class_noun.split()))
        return re.compile(rf"{re.escape(self.placeholder)}(?:\s+(?i:{noun})(?![\w-]))?")

    def template(self, prompt: str) -> str:
        """A user's prompt as a template: the placeholder, alone or before the class noun, becomes the slot.

        So the same prompt suits methods that say "<dog7>" and methods that say "<dog7> dog". The noun counts as a whole
        word, not as the beginning of "doghouse" or "dogs", in capitals or not, as tokenizers read it.

        Raises:
            InputError: the prompt does not mention the concept, or has a slot already.
        """
        if SLOT in prompt:
            raise InputError(
                f"the prompt has {SLOT!r}, which stands for the concept in prompt lists: {shown(prompt)}. "
                f"Write {self.placeholder!r} where the concept belongs, and leave {SLOT!r} out."
            )
        template = self.mention.sub(lambda found: SLOT, prompt)
        if SLOT not in template:
            raise InputError(
                f"the prompt does not mention the concept {self.name!r}: {shown(prompt)}. "
                f"Write {self.placeholder!r} where the concept belongs."
            )
        return template


def check_read_as_words(text: str) -> None:
    """Raise InputError if a text has a mark that tokenizers put at its ends themselves."""
    if found := _MARK.search(text):
        raise InputError(
            f"{found[0]!r} is no word to a text encoder but its own mark of where a text begins or ends, and what "
            f"follows it may not be read: {shown(text)}. Leave it out."
        )


def check_placeholders(prompt: str, concepts: Iterable[Concept]) -> None:
    """
    Raises:
        InputError: the prompt has the placeholder of a concept that is none of these, which the base model would read
            as letters, or what it would not read as words.
    """
    check_read_as_words(prompt)
    known = {concept.placeholder for concept in concepts}
    if others := [found for found in dict.fromkeys(_PLACEHOLDER.findall(prompt)) if found not in known]:
        raise InputError(
            f"the prompt has {listed(map(repr, others))}, which stands for no concept of these images, so that the "
            f"base model would read it as letters: {shown(prompt)}. Write a word that it knows in its place; only "
            "`personalize compose` shows several concepts."
        )


def check_name(name: str) -> None:
    """Raise unless `name` can be a folder, a partition key and a placeholder at once."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{shown(name)} cannot be a concept's name; use 1 to 63 lower-case letters, digits, '-' and '_', "
            "beginning with a letter or digit, such as 'dog7'"
        )
