"""What a judge is asked, and how its answer is read.

The two questions and the scale of whole numbers from 0 to 4 are DreamBench++'s (Peng et al. 2024, arXiv 2406.16855);
the words are our own, so scores are not to be laid beside those that the paper publishes.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

VERSION = 1  # to be raised with every change of a word below: kept answers are to these words
MOST = 4  # the best score
MOST_TEXT = 20_000  # characters of an answer; a longer one is not read

_FORMAT = (
    "Reply with one JSON object and nothing else, in this form:\n"
    '{"score": N, "reason": "one short sentence"}\n'
    "where N is a whole number from 0 to 4."
)
_CONCEPT_PRESERVATION = """\
You are given two images. The first shows one particular {noun}. The second was made by a program that was asked to \
show the very same {noun}, possibly in another place or doing something else.

How well does the second image keep what makes this {noun} recognisable? Compare these traits:
- Shape: outline, proportions, and which parts there are.
- Colour: the main colours, and on which part each of them is.
- Texture: material, pattern, markings and other detail of the surface.
- Face: only if the {noun} has one, its features and how they are arranged.

Leave aside what is not part of the {noun}: background, lighting, viewpoint, pose, size, and how sharp or beautiful \
either image is.

Scale:
0: there is no {noun} in the second image, or it shares none of these traits with the first.
1: it is a {noun}, but hardly any trait is the same.
2: some traits are the same and some clearly are not; it might be a relative of the first.
3: nearly all traits are the same; a careful look finds differences.
4: every trait that can be seen is the same; it could be the same {noun}.

"""
_PROMPT_FOLLOWING = """\
You are given one image. A program made it for this prompt:
{prompt}

How completely does the image show what the prompt says? Check everything that the prompt names: things and how many \
they are, their properties, what they do, the place, how things stand to each other, and the style if one is asked for.

Leave aside what the prompt does not mention, and how sharp or beautiful the image is.

Scale:
0: nothing of the prompt is shown.
1: a small part of it is shown.
2: about half of it is shown, or its main point is missing.
3: nearly all of it is shown; a detail is missing or wrong.
4: all of it is shown.

"""


class Unreadable(Exception):
    """An answer that is not what was asked for; says how it is not."""


@dataclass(frozen=True)
class Verdict:
    """What a judge said of an image."""

    score: int  # 0 to MOST
    reason: str


def concept_preservation(class_noun: str) -> str:
    """The question about two images, a concept image and a sampled one, in this order."""
    return _CONCEPT_PRESERVATION.format(noun=class_noun) + _FORMAT


def prompt_following(prompt: str) -> str:
    """The question about one image. prompt: with the class noun in the concept's place."""
    return _PROMPT_FOLLOWING.format(prompt=json.dumps(prompt, ensure_ascii=False)) + _FORMAT


def read(answer: str) -> Verdict:
    """The verdict in an answer: a JSON object, alone or in a code fence, after a block of thinking if there is one.

    Raises:
        Unreadable: it is anything else.
    """
    if len(answer) > MOST_TEXT:
        raise Unreadable(f"it has {len(answer):,} characters")
    text = re.sub(r"\A\s*<think>.*?</think>", "", answer, count=1, flags=re.DOTALL).strip()
    if fenced := re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL | re.IGNORECASE):
        text = fenced[1]
    if not text:
        raise Unreadable("it is empty")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise Unreadable("it is not one JSON object") from None
    if not isinstance(found, dict) or set(found) != {"score", "reason"}:
        raise Unreadable("it is not an object with score and reason")
    score, reason = found["score"], found["reason"]
    if not isinstance(score, int) or isinstance(score, bool) or not 0 <= score <= MOST:
        raise Unreadable(f"its score is no whole number from 0 to {MOST}")
    if not isinstance(reason, str):
        raise Unreadable("its reason is no text")
    return Verdict(score, reason)
