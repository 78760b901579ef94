"""Class nouns: scores against a loop, lists of nouns from everywhere, WordNet's from a lexicon written here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import wn

from personalize_core.analyses import class_nouns
from personalize_core.errors import InputError

LEXICON = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE LexicalResource SYSTEM "http://globalwordnet.github.io/schemas/WN-LMF-1.1.dtd">
<LexicalResource xmlns:dc="https://globalwordnet.github.io/schemas/dc/">
  <Lexicon id="tiny" label="tiny" language="en" email="a@b.c" license="none" version="1">
    {entries}
    {synsets}
  </Lexicon>
</LexicalResource>
"""


@pytest.fixture
def wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of the package wn, empty."""
    monkeypatch.setattr(wn.config, "data_directory", tmp_path / "wn")
    return tmp_path


def installed(folder: Path, *entries: tuple[str, str]) -> None:
    """entries: (lemma, part of speech)."""
    words = [
        f'<LexicalEntry id="tiny-{n}"><Lemma writtenForm="{lemma}" partOfSpeech="{pos}"/>'
        f'<Sense id="tiny-{n}-s" synset="tiny-{n}-{pos}"/></LexicalEntry>'
        for n, (lemma, pos) in enumerate(entries)
    ]
    synsets = [f'<Synset id="tiny-{n}-{pos}" ili="" partOfSpeech="{pos}"/>' for n, (_, pos) in enumerate(entries)]
    path = folder / "tiny.xml"
    path.write_text(LEXICON.format(entries="".join(words), synsets="".join(synsets)))
    wn.add(path, progress_handler=None)


def test_the_nouns_of_wordnet_are_its_distinct_lemmas_with_blanks_that_can_be_class_nouns(wordnet):
    entries = [("dog", "n"), ("stuffed_animal", "n"), ("run", "v"), ("dog", "n"), ("9/11", "n"), ("teddy bear", "n")]
    installed(wordnet, *entries)
    assert class_nouns.nouns_of("wordnet") == ["dog", "stuffed animal", "teddy bear"]
    assert class_nouns.nouns_of("wordnet:tiny:1") == class_nouns.nouns_of("wordnet")


@pytest.mark.parametrize("source", ["wordnet", "wordnet:oewn:2024"])
def test_without_a_wordnet_on_the_machine_the_message_says_how_to_get_one(source, wordnet):
    with pytest.raises(InputError, match="python -m wn download"):
        class_nouns.nouns_of(source)


def test_nouns_come_from_a_file_too(tmp_path):
    path = tmp_path / "nouns.txt"
    path.write_text("mug\n\n dog \nmug\n42\n")
    assert class_nouns.nouns_of(str(path)) == ["dog", "mug"]
    path.write_text("42\n")
    with pytest.raises(InputError, match="holds none that can be a class noun"):
        class_nouns.nouns_of(str(path))
    with pytest.raises(InputError, match="no list of nouns 'nowhere'"):
        class_nouns.nouns_of("nowhere")


def test_the_common_nouns_are_what_the_mini_world_draws():
    from personalize_core.mini.names import CATEGORIES

    assert class_nouns.nouns_of("common") == sorted(CATEGORIES)


class Texts:
    """An encoder whose feature of a text tells its length."""

    def texts(self, texts):
        angles = torch.tensor([float(len(text)) for text in texts]) / 10
        return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_a_noun_scores_its_texts_mean_cosine_with_the_concept_images(monkeypatch):
    monkeypatch.setattr(class_nouns, "CHUNK", 2)  # so that three nouns take two parts
    nouns, seen = ["dog", "stuffed animal", "mug"], []
    encoder: class_nouns.TextImageEncoder = Texts()  # type: ignore[assignment]  of an encoder only this is used
    texts = class_nouns.matrix(encoder, nouns, lambda done, total: seen.append((done, total)))
    assert seen == [(2, 3), (3, 3)]
    concept_images = np.array([[1.0, 0.0], [0.6, 0.8]])
    found = class_nouns.scores(concept_images, texts)
    for noun, score in zip(nouns, found, strict=True):
        angle = len(f"a photo of a {noun}") / 10
        cosines = [np.cos(angle) * x + np.sin(angle) * y for x, y in concept_images]
        assert score == pytest.approx(sum(cosines) / 2, abs=1e-6)


def test_the_best_noun_stands_first_and_equal_ones_by_the_alphabet():
    rows = class_nouns.ranked(["mug", "cup", "dog"], np.array([0.2, 0.2, 0.3]), "cup")
    assert [(row["rank"], row["noun"], row["is_class_noun"]) for row in rows] == [
        (1, "dog", False),
        (2, "cup", True),
        (3, "mug", False),
    ]
