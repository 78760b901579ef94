"""Which noun names a concept best? Macro-class selection over WordNet's nouns by CLIP.

Personalized Residuals (Ham et al. 2024) takes the noun that CLIP finds most like the concept. Its supplement could not
be read; the text "a photo of a NOUN" and the mean over the concept images are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from personalize_core.concepts.concept import Concept
from personalize_core.errors import InputError
from personalize_core.files.outside import is_there, read_text
from personalize_core.metrics.encoders import TextImageEncoder

TITLE = "Class nouns"
# Plain things that the mini world has and every other base model knows too.
COMMON_NOUNS = (
    *("backpack", "bear", "boat", "car", "cat", "clock", "dog", "duck"),
    *("fish", "hat", "mug", "robot", "rocket", "shoe", "teapot", "umbrella"),
)
COMMON, WORDNET = "common", "wordnet"
CHUNK = 1024  # texts encoded between two signs of life
MEANINGS = {
    "rank": "1 is the most like the concept",
    "noun": "the noun, as it follows 'a photo of a'",
    "score": "mean over the concept images of the cosine with the text 'a photo of a NOUN', by the text-image encoder",
    "is_class_noun": "is it the concept's class noun now?",
}


def nouns_of(source: str) -> list[str]:
    """The nouns to choose from, sorted, each once; only such as can be a class noun.

    Args:
        source: "common", the few that come with this package; "wordnet", or "wordnet:LEXICON", from what the package
            `wn` has installed on this machine; or a text file with a noun a line.

    Raises:
        InputError: there is no such list, or no WordNet is installed.
    """
    name, _, lexicon = source.partition(":")
    if source == COMMON:
        nouns: Sequence[str] = COMMON_NOUNS
    elif name == WORDNET:
        nouns = _of_wordnet(lexicon)
    elif is_there(Path(source)):
        nouns = [line.strip() for line in read_text(Path(source)).splitlines()]
    else:
        raise InputError(f"there is no list of nouns {source!r}: write {COMMON!r}, {WORDNET!r} or the path of a file")
    found = sorted({noun.replace("_", " ") for noun in nouns})
    if not (usable := [noun for noun in found if _can_be_class_noun(noun)]):
        raise InputError(f"the list of nouns {source!r} holds none that can be a class noun")
    return usable


def _of_wordnet(lexicon: str) -> list[str]:
    import wn

    how = "install one with `python -m wn download oewn:2024`, or give a file of nouns"
    try:
        found = wn.Wordnet(lexicon=lexicon) if lexicon else wn.Wordnet(lang="en")
        nouns = [word.lemma() for word in found.words(pos="n")]
    except wn.Error as error:
        raise InputError(f"there is no WordNet {lexicon or 'for English'!r} on this machine ({error}); {how}") from None
    if not nouns:
        raise InputError(f"the WordNet {lexicon or 'for English'!r} on this machine holds no nouns; {how}")
    return nouns


def _can_be_class_noun(noun: str) -> bool:
    try:
        Concept("x", "<x>", noun)
    except InputError:
        return False
    return True


def matrix(
    encoder: TextImageEncoder, nouns: Sequence[str], progress: Callable[[int, int], None] = lambda done, all: None
) -> np.ndarray:
    """(N, D) float32, rows of length one: the text "a photo of a NOUN"."""
    parts = []
    for start in range(0, len(nouns), CHUNK):
        some = nouns[start : start + CHUNK]
        parts.append(encoder.texts([f"a photo of a {noun}" for noun in some]).numpy())
        progress(start + len(some), len(nouns))
    return np.concatenate(parts)


def scores(concept_images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """(N,) float64: each text's mean cosine with the concept images, (R, D); all rows of length one."""
    return texts.astype(np.float64) @ concept_images.astype(np.float64).mean(axis=0)


def ranked(nouns: Sequence[str], found: np.ndarray, class_noun: str) -> list[dict[str, Any]]:
    """Rows of MEANINGS, the best first; equal scores by the alphabet."""
    order = sorted(range(len(nouns)), key=lambda index: (-found[index], nouns[index]))
    return [
        {"rank": rank, "noun": nouns[i], "score": float(found[i]), "is_class_noun": nouns[i] == class_noun}
        for rank, i in enumerate(order, start=1)
    ]
