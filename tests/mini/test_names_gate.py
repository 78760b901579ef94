"""What the gates of names count, and that Textual Inversion fits an embedding."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from personalize_core.metrics.tables import ALL_CONCEPTS
from personalize_core.mini import concepts, name_reader, named, personalization, tokenizer, world
from personalize_core.mini.gates import names as names_gate
from personalize_core.mini.gates.judging import Judgement
from personalize_core.mini.gates.thresholds import NEEDED, passed
from personalize_core.mini.named import Composer, Speaker
from personalize_core.mini.names import CATEGORIES
from personalize_core.mini.networks import text_encoder
from personalize_core.mini.text import IGNORED


@pytest.fixture(scope="module")
def speaker():
    words = tokenizer.load()
    torch.manual_seed(0)
    return Speaker(words, text_encoder(len(words), words.eos_token_id).eval().requires_grad_(False), Composer())


class Unet(torch.nn.Module):
    """Answers with one number of what the text encoder says last."""

    def forward(self, x, t, context):
        return SimpleNamespace(sample=torch.zeros_like(x) + context[:, -1, :1, None, None])


def test_an_embedding_is_fitted_from_the_nouns_and_the_text_encoder_stays(speaker):
    before = {key: value.clone() for key, value in speaker.text_encoder.state_dict().items()}
    start = before["embeddings.token_embedding.weight"][named.word_id(speaker.words, "bear")]
    vectors = [
        names_gate.fitted(speaker, Unet(), torch.zeros(4, 4, 16, 16), "bear", steps=steps) for steps in (0, 20, 20)
    ]
    assert torch.equal(vectors[0], start)
    assert not torch.equal(vectors[1], start) and torch.equal(vectors[1], vectors[2])
    assert all(torch.equal(value, before[key]) for key, value in speaker.text_encoder.state_dict().items())


def test_renders_are_of_the_same_design_on_a_plain_backdrop_in_other_poses():
    scene = named.judged_names(1)[0]
    found = names_gate.renders(scene, 4)
    assert found == names_gate.renders(scene, 4) and len({one.pose for one in found}) == 4
    assert all(one.design == scene.design and one.place == "" for one in found)


def test_a_colour_counts_wherever_the_reader_sees_it(monkeypatch):
    scenes = named.judged_names(4)
    truth = name_reader.truths(scenes)
    first, second = truth["first colour"].clone(), truth["second colour"].clone()
    other = torch.tensor([next(n for n in range(12) if n not in (a, b)) for a, b in zip(first, second, strict=True)])
    read = {
        "category": torch.where(torch.arange(4) < 3, truth["category"], (truth["category"] + 1) % 16),
        "first colour": torch.stack([second[0], first[1], other[2], other[3]]),
        "second colour": torch.stack([first[0], other[1], first[2], other[3]]),
    }
    monkeypatch.setattr(name_reader, "verdicts", lambda network, images: read)
    figures = names_gate.recognised(torch.nn.Identity(), np.zeros((4, 64, 64, 3), np.uint8), scenes)
    assert figures == {"category": 0.75, "one colour": 0.75, "both colours": 0.25}


def test_the_reader_learns_from_scenes_that_say_what_they_show(tmp_path):
    rng = np.random.default_rng(0)
    scenes = name_reader.judged_scenes(rng, 60)
    truth = name_reader.truths(scenes)
    plain = torch.tensor([scene.design.layout == "plain" for scene in scenes])
    assert (truth["second colour"][plain] == IGNORED).all() and (truth["second colour"][~plain] != IGNORED).all()
    stage = name_reader.NameReader(batch=4)
    loss, seen = stage.step(0, np.random.default_rng(1), torch.Generator().manual_seed(0))
    assert torch.isfinite(loss) and seen == 4
    images = np.stack([world.draw(scene)[0] for scene in scenes[:3]])
    assert {key: len(value) for key, value in name_reader.verdicts(stage.network, images).items()} == dict.fromkeys(
        ("category", *name_reader.READ), 3
    )


def test_the_gate_of_words_counts_concepts_intervals_and_categories(monkeypatch, tmp_path):
    (tmp_path / "params.yaml").write_text("methods: {}")
    names = list(concepts.DESIGNS)
    above = {name: {"difference": 0.2, "low": 0.1 if n < 5 else -0.1} for n, name in enumerate(names)}
    grids = {(method, name): tmp_path for method in personalization.WORDS for name in names}
    monkeypatch.setattr(personalization, "compared", lambda workspace, params, methods: (None, grids))
    everywhere = {ALL_CONCEPTS: {"difference": 0.2, "low": 0.05}}
    monkeypatch.setattr(personalization, "gains", lambda store, method: above | everywhere)
    monkeypatch.setattr(personalization, "images_in", lambda grid, method: np.zeros((4, 64, 64, 3), np.uint8))
    monkeypatch.setattr(personalization, "row_of", lambda *of: [np.zeros((64, 64, 3), np.uint8)] * 8)
    bears = {"category": torch.full((4,), CATEGORIES.index("bear"))}
    monkeypatch.setattr(personalization.classifier, "verdicts", lambda network, images: bears)
    network: Any = None
    figures, measured_on, images = personalization.run_words(tmp_path, network, tmp_path / "params.yaml")
    assert figures["textual_inversion: concepts whose interval lies above"] == 5
    assert figures["neti: low end of its 95 % interval"] == 0.05
    assert figures["textual_inversion: category named"] == 1 / 8
    assert set(NEEDED["words"]) <= set(figures) and not passed("words", figures)
    assert measured_on.startswith("8 concepts, 2 images on each of 10 places") and len(images) == 64


def test_gates_of_names_ask_for_the_names_that_were_trained(tmp_path):
    judgement = Judgement(tmp_path, tmp_path)
    with pytest.raises(SystemExit, match="stage 'phrased' or 'named'"):
        _ = judgement.speaker
    with pytest.raises(SystemExit, match="stage 'name_reader'"):
        _ = judgement.reader
    with pytest.raises(SystemExit, match="gate 'words' runs the steps that users run"):
        judgement.words()
