"""Where a prompt names the concept, so that prompts of different programs can be recognised as one.

One trainer writes "a photo of sks dog on the beach", another "a photo of <dog7> on the beach". Both are the template
"a photo of {} on the beach", the slot standing for the concept.
"""

from __future__ import annotations

import re

from personalize_core.concepts.concept import SLOT, Concept
from personalize_core.errors import InputError, shown

# What papers and trainers write before the class noun, or in its place: "<new1>", "<dog7>", "V*", "[V]", "sks", ...
_IDENTIFIER = r"(?:<[^<>\s]{1,64}>|\[[A-Za-z]\]|[SV]\*|sks|ohwx|zwx|TOK)"
_WORD_BEFORE, _WORD_AFTER = r"(?<![\w-])", r"(?![\w-])"


class Mentions:
    """Finds a concept in prompts.

    Args:
        mention: what stands for the concept in them, such as "sks dog". By default it is the concept's placeholder,
            or else its class noun, each with an identifier of the usual kind before it, if any.

    Raises:
        InputError: the mention is empty or holds the slot.
    """

    def __init__(self, concept: Concept, mention: str | None = None) -> None:
        self.concept, self.mention = concept, mention
        noun = _phrase(concept.class_noun)
        if mention is not None:
            if not mention.strip() or SLOT in mention:
                raise InputError(
                    f"{shown(mention)} cannot stand for the concept in prompts; write the words as the prompts have "
                    "them, such as 'sks dog'"
                )
            self._patterns = [_whole(_phrase(mention))]
        else:
            self._patterns = [
                concept.mention,
                _whole(rf"{_IDENTIFIER}\s+{noun}"),
                _whole(noun),
            ]

    def template(self, prompt: str) -> str | None:
        """The prompt with the slot in place of each mention of the concept; None where it has no mention.

        A slot that the prompt holds already stands for the concept too.
        """
        text = " ".join(prompt.split())
        if SLOT in text:
            return text
        for pattern in self._patterns:
            found = pattern.sub(lambda match: SLOT, text)
            if found != text:
                return found
        return None


def _phrase(words: str) -> str:
    return r"\s+".join(map(re.escape, words.split()))


def _whole(pattern: str) -> re.Pattern[str]:
    """As whole words, in capitals or not, as tokenizers read them."""
    return re.compile(f"{_WORD_BEFORE}{pattern}{_WORD_AFTER}", re.IGNORECASE)
