"""The gates count what they say they count, on as many samples as they say."""

import argparse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from personalize_core import steps
from personalize_core.mini import classifier, concepts, diffusion, personalization, text, tokenizer, world
from personalize_core.mini.gates.__main__ import counted
from personalize_core.mini.gates.autoencoder import autoencoder_gate
from personalize_core.mini.gates.identity import found_again, identity_gate, look_alikes, near_misses
from personalize_core.mini.gates.image_sets import tiled
from personalize_core.mini.gates.judging import Judgement, judged
from personalize_core.mini.gates.model_card import ABOUT, card, still_true
from personalize_core.mini.gates.pictures import held_out_words, pictures_gate
from personalize_core.mini.gates.text import text_gate
from personalize_core.mini.gates.thresholds import NEEDED, SEEN, passed
from personalize_core.mini.names import CATEGORIES, COLOURS, PLACES
from personalize_core.workspace.params import Params
from personalize_core.workspace.store import Store


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.build(folder)
    return tokenizer.load(folder)


def enough(gate):
    """Figures that pass a gate by nothing to spare, each the mean of float32 hits."""
    figures = {name: float(torch.tensor(least)) for name, least in NEEDED[gate].items()}
    if gate == "autoencoder":
        for aspect in ("category", "colour"):
            figures |= {f"{aspect} read from originals": 0.985, f"{aspect} read from reconstructions": 0.955}
    if gate in SEEN:
        what, least, _ = SEEN[gate]
        figures[what] = least
    return figures


@pytest.mark.parametrize("gate", list(SEEN))
def test_a_gate_that_takes_an_eye_is_not_passed_before_enough_was_seen(gate):
    what, least, all_ = SEEN[gate]
    assert passed(gate, enough(gate) | {what: all_})
    assert not passed(gate, enough(gate) | {what: least - 1})
    assert not passed(gate, {name: value for name, value in enough(gate).items() if name != what})


@pytest.mark.parametrize("text", ["pictures", "pictures=25", "pictures=-1", "clip=3", "personalization=all"])
def test_what_was_seen_is_a_number_of_a_gate_that_takes_an_eye(text):
    assert counted("pictures=24") == ("pictures", 24)
    with pytest.raises(argparse.ArgumentTypeError, match="pictures=0 to pictures=24"):
        counted(text)


@pytest.mark.parametrize("gate", list(NEEDED))
def test_a_gate_is_passed_at_its_very_bound_and_not_below(gate):
    assert passed(gate, enough(gate))
    for name, least in NEEDED[gate].items():
        assert not passed(gate, enough(gate) | {name: least - 0.002})
        assert not passed(gate, enough(gate) | {name: float("nan")})


@pytest.mark.parametrize("aspect", ["category", "colour"])
def test_the_autoencoder_may_lose_three_points_and_no_more(aspect):
    assert not passed("autoencoder", enough("autoencoder") | {f"{aspect} read from reconstructions": 0.9525})


def test_every_gate_has_a_bound_and_names_its_weights():
    assert set(NEEDED) == set(ABOUT) == {g for g in ABOUT if hasattr(Judgement, g)}


def test_as_many_held_out_words_as_asked_for_and_all_of_them_first():
    found = held_out_words(200)
    assert len(found) == 200 and all(diffusion.held_out(*words) for words in found)
    every = [(c, k, p) for c in CATEGORIES for k in COLOURS for p in PLACES if diffusion.held_out(c, k, p)]
    assert set(found[: len(every)]) == set(every)


def test_the_pictures_gate_asks_with_another_seed_each_time_and_counts_what_was_asked(monkeypatch):
    asked = []

    def sample(vae, words, text_encoder, unet, prompts, guidance, seed):
        asked.extend((prompt, seed + n) for n, prompt in enumerate(prompts))
        return np.zeros((len(prompts), 64, 64, 3), np.uint8)

    def verdicts(judge, images):
        """Right on the category, right on every other colour, never on the place."""
        shown = held_out_words(len(images))
        colours = [list(COLOURS).index(c) for _, c, _ in shown]
        return {
            "category": torch.tensor([CATEGORIES.index(c) for c, _, _ in shown]),
            "colour": torch.tensor([c if n % 2 else (c + 1) % 8 for n, c in enumerate(colours)]),
            "place": torch.tensor([(list(PLACES).index(p) + 1) % 10 for _, _, p in shown]),
        }

    monkeypatch.setattr("personalize_core.mini.gates.pictures.sample", sample)
    monkeypatch.setattr(classifier, "verdicts", verdicts)
    monkeypatch.setattr("personalize_core.mini.gates.pictures.judge_scores", lambda judge, pictures: {})
    parts = SimpleNamespace(vae=None, tokenizer=None, text_encoder=None, unet=None)
    figures, measured_on, images = pictures_gate(parts, None, 3.0, count=150)  # type: ignore[arg-type]
    assert figures == {"category named": 1, "colour named": 0.5, "place named": 0}
    assert len(images) == 150 and len(set(asked)) == 150 and len({seed for _, seed in asked}) == 150
    assert measured_on.startswith("150 samples of 117 held-out combinations")


def test_look_alikes_are_other_designs_on_the_concepts_sprites():
    found = look_alikes()
    assert len(found) == 50 == len(set(found))
    assert not set(found) & set(concepts.DESIGNS.values())
    for original in concepts.DESIGNS.values():
        alike = [other for other in found if other.sprite == original.sprite]
        kept = [other.mark == original.mark and other.layout == original.layout for other in alike]
        assert any(kept) and not all(kept)
        assert all(set(other.colours) != set(original.colours) for other in alike)


def test_a_near_miss_differs_in_one_thing():
    for original in concepts.DESIGNS.values():
        for other in near_misses(original, np.random.default_rng(3)):
            differing = [name for name in vars(original) if getattr(original, name) != getattr(other, name)]
            assert len(differing) == 1
            assert sum(a != b for a, b in zip(original.colours, other.colours, strict=True)) <= 1
            assert other.mark_colour not in other.colours or other.mark_colour in original.colours


def test_found_again_is_the_share_whose_nearest_is_their_own():
    gallery = torch.eye(3)
    owners = torch.tensor([0, 1, -1])
    asked = torch.nn.functional.normalize(torch.tensor([[3.0, 1, 0], [0, 2, 1], [0, 1, 2], [1, 2, 0]]), dim=1)
    assert found_again(asked, torch.tensor([0, 1, 1, 0]), gallery, owners) == 0.5


class Colours:
    """An identity encoder that sees nothing but the mean colour of the image's middle."""

    def images(self, images):
        middles = np.stack([np.asarray(p)[20:52, 16:48].astype(np.float32).mean((0, 1)) for p in images])
        return torch.nn.functional.normalize(torch.from_numpy(middles - middles.mean()), dim=1)


class Blind:
    def images(self, images):
        return torch.ones(len(images), 1)


class Same(torch.nn.Module):
    """An autoencoder that gives back what it is given, moved by an offset."""

    def __init__(self, offset=0.0):
        super().__init__()
        self.offset = offset

    def forward(self, x):
        return SimpleNamespace(sample=x + self.offset)


def test_the_identity_gate_tells_an_encoder_that_sees_from_one_that_does_not(monkeypatch):
    monkeypatch.setattr("personalize_core.mini.gates.identity.load_identity_encoder", lambda folder: Blind())
    blind, _ = identity_gate("anywhere", Same())  # type: ignore[arg-type]
    monkeypatch.setattr("personalize_core.mini.gates.identity.load_identity_encoder", lambda folder: Colours())
    seeing, measured_on = identity_gate("anywhere", Same())  # type: ignore[arg-type]
    name = "nearest is the same concept, renders"
    assert blind[name] == pytest.approx(1 / 8)  # the first of the gallery, a backpack, is as near as any
    assert seeing[name] > blind[name] + 0.1
    assert seeing[name] == seeing["nearest is the same concept, reconstructed renders"]  # Same changes nothing
    assert measured_on.startswith("96 renders, 40 photographs, 100 renders of 50 look-alikes")


def test_the_autoencoder_gate_measures_decibels_and_what_is_lost(monkeypatch):
    monkeypatch.setattr(
        classifier, "verdicts", lambda judge, images: {a: torch.zeros(30) for a in ("category", "colour")}
    )
    perfect, _ = autoencoder_gate(Same(), None, fresh=10, read_on=30)  # type: ignore[arg-type]
    off, measured_on = autoencoder_gate(Same(20 / 127.5), None, fresh=10, read_on=30)  # type: ignore[arg-type]
    assert perfect["dB on fresh scenes"] > 100
    assert 20 * np.log10(255 / 20) <= off["dB on fresh scenes"] < 24  # 20 off, or less where white is the end
    assert off["category read from originals"] == off["category read from reconstructions"]
    assert measured_on.startswith("10 fresh scenes, the concepts' 40 photographs; read from 30")


class Bag:
    """A text encoder whose output sums up a random row for each token so far; or says nothing at all."""

    def __init__(self, size, deaf=False):
        self.rows = torch.randn(size, 96, generator=torch.Generator().manual_seed(0)) * (not deaf)

    def __call__(self, ids):
        return SimpleNamespace(last_hidden_state=self.rows[ids].cumsum(1))


def test_the_text_gate_passes_an_encoder_that_says_every_word_and_fails_a_deaf_one(words):
    clear, measured_on = text_gate(Bag(len(words)), words)
    deaf, _ = text_gate(Bag(len(words), deaf=True), words)
    assert passed("text", clear) and not passed("text", deaf)
    assert deaf["category"] < 0.2 and measured_on.startswith("500 captions")
    assert set(clear) == set(text.ASPECTS)


def test_the_swap_table_counts_how_often_the_true_caption_has_the_lower_loss():
    drawn = diffusion.judged_scenes(8)
    true = [world.caption(scene) for scene in drawn]
    disliked = set(true[:2])  # of these two scenes the fake U-Net does worse with the true caption

    class Words:
        def __call__(self, captions, **options):
            wrong = [(c in disliked) if c in true else (true[n] not in disliked) for n, c in enumerate(captions)]
            return SimpleNamespace(input_ids=torch.tensor(wrong).float()[:, None])

    class Unet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, t, context):
            return SimpleNamespace(sample=torch.zeros_like(x) + 10 * context[:, :, None, None])

    table = diffusion.swap_table(
        Words(), lambda ids: SimpleNamespace(last_hidden_state=ids), Unet(), drawn, torch.zeros(8, 4, 16, 16)
    )
    for row in table.values():
        assert row["wins"] == 6 / 8
        assert row["added loss"] == pytest.approx(100 * (6 - 2) / 8, abs=1)
        # six times 100 and twice -100: a deviation of sqrt(8/7 * 7500), over sqrt(8)
        assert row["standard error"] == pytest.approx((7500 * 8 / 7) ** 0.5 / 8**0.5, rel=0.02)


@pytest.mark.parametrize("aspect", ["category", "colour", "place"])
def test_a_swapped_caption_differs_in_its_one_word(aspect):
    rng = np.random.default_rng(1)
    for scene in diffusion.judged_scenes(20):
        own = {"category": scene.category, "colour": scene.design.colours[0], "place": PLACES[scene.place]}[aspect]
        options = {"category": CATEGORIES, "colour": COLOURS, "place": [p for p in PLACES.values() if p]}[aspect]
        before, after = world.caption(scene), diffusion.swapped(scene, aspect, rng)
        assert after in {before.replace(own, other) for other in options if other != own}


def test_a_grid_fills_its_last_row_with_white():
    image = np.zeros((5, 4, 4, 3), np.uint8)
    grid = np.asarray(tiled(image, 3, scale=1))
    assert grid.shape == (8, 12, 3)
    assert not grid[:4].any() and not grid[4:, :8].any() and (grid[4:, 8:] == 255).all()


def test_the_card_forgets_figures_of_weights_that_changed(tmp_path):
    weights, work = tmp_path / "weights", tmp_path / "work"
    for folder in ("clip", "identity", "base/vae"):
        (weights / folder).mkdir(parents=True)
        (weights / folder / "model.safetensors").write_bytes(folder.encode())
    work.mkdir()
    judgement = Judgement(work, weights)
    judgement.clip = lambda: (enough("clip"), "2 renders")  # type: ignore[method-assign]
    judgement.identity = lambda: (enough("identity") | {"extra": 0.1}, "3 renders")  # type: ignore[method-assign]
    facts = judged(judgement, ["identity"])
    facts = judged(judgement, ["clip"])
    assert list(facts["gates"]) == ["clip", "identity"]  # the one measured before is kept
    assert facts["gates"]["identity"]["figures"]["extra"] == 0.1
    text = (weights / "MODEL_CARD.md").read_text()
    assert "identity: 3 renders" in text and "unet" in text.split("not measured")[0].splitlines()[-1]
    (weights / "base" / "vae" / "model.safetensors").write_bytes(b"another")
    assert list(still_true(weights)) == ["clip"]  # the identity gate looks through the autoencoder


def test_the_card_keeps_what_was_seen_until_the_weights_change(tmp_path):
    weights, work = tmp_path / "weights", tmp_path / "work"
    (weights / "base").mkdir(parents=True)
    (weights / "base" / "model.safetensors").write_bytes(b"base")
    work.mkdir()
    judgement = Judgement(work, weights)
    with pytest.raises(SystemExit, match="has not been measured"):
        judged(judgement, [], {"pictures": 24})
    judgement.pictures = lambda: (dict.fromkeys(NEEDED["pictures"], 1.0), "2 samples")  # type: ignore
    assert not judged(judgement, ["pictures"])["gates"]["pictures"]["passed"]
    assert "Nobody has yet counted, for pictures" in (weights / "MODEL_CARD.md").read_text()
    assert judged(judgement, [], {"pictures": 21})["gates"]["pictures"]["passed"]
    written = (weights / "MODEL_CARD.md").read_text()
    assert "recognised by eye | 21 | 20 of 24 |" in written and "Nobody" not in written
    (weights / "base" / "model.safetensors").write_bytes(b"other")
    assert still_true(weights) == {}


def test_the_card_remembers_stages_whose_checkpoints_are_gone(tmp_path):
    weights, work = tmp_path / "weights", tmp_path / "work"
    for folder in (weights, work):
        folder.mkdir()
    (weights / "model_card.json").write_text('{"stages": {"unet": {"steps": 7}}, "gates": {}}')
    assert card(work, weights, {})["stages"] == {"unet": {"steps": 7}}


def test_the_photographs_stand_before_pictures_on_places_that_they_do_not_show(tmp_path):
    store, name = Store(tmp_path), "teapot1"
    concepts.write(store.concepts)
    grid = tmp_path / "grid"
    places = [place for place in PLACES if place]
    for prompt in range(len(places)):
        for image in range(2):
            path = grid / steps.image_name("dreambooth", prompt, image)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (prompt, image, 0)).save(path)
    row = personalization.row_of(store, name, grid)
    assert len(row) == 8 and all(image.shape == (64, 64, 3) for image in row)
    asked = [places[image[0, 0, 0]] for image in row[2:]]
    assert not set(asked) & set(concepts.PLACES[name])


def test_gate_6_is_of_the_recipe_that_users_run():
    params = Params.read(Path(__file__).parents[2] / "params.yaml")
    assert personalization.RECIPE == params.methods["dreambooth"]["mini"] and personalization.RECIPE["steps"] == 200
