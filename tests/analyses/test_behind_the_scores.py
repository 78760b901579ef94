"""What the headline hides: each number against loops over pairs in NumPy, each rule on cases that are known."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from personalize_core.analyses import absence, copying, diversity, drift, object_masks, per_kind, per_prompt
from personalize_core.analyses.findings import Findings, NotDefined
from personalize_core.concepts.concept import Concept
from personalize_core.concepts.preprocessing import Preprocessing
from personalize_core.concepts.prompt_lists import read_list
from personalize_core.metrics import parquet, tables


def rows(count: int, width: int, seed: int) -> np.ndarray:
    """(count, width), of length one."""
    found = np.random.default_rng(seed).normal(size=(count, width))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


# Copying


def test_the_nearest_concept_image_and_its_cosine_are_those_of_a_loop():
    images, concept_images = rows(7, 5, 0), rows(4, 5, 1)
    found = copying.nearest(images, concept_images)
    for n, image in enumerate(images):
        cosines = [float(np.dot(image, concept_image)) for concept_image in concept_images]
        assert found.index[n] == cosines.index(max(cosines))
        assert found.similarity[n] == pytest.approx(max(cosines), abs=1e-12)


def test_leaving_one_out_is_the_mean_over_all_ways_to_do_it():
    images, concept_images = rows(7, 5, 0), rows(4, 5, 1)
    found = copying.nearest(images, concept_images).with_one_left_out
    for n, image in enumerate(images):
        greatest = [max(float(image @ concept_images[k]) for k in range(4) if k != left_out) for left_out in range(4)]
        assert found is not None and found[n] == pytest.approx(np.mean(greatest), abs=1e-12)


def test_concept_images_are_held_out_from_themselves():
    concept_images = rows(5, 6, 2)
    found = copying.held_out(concept_images)
    for one in range(5):
        cosines = {other: float(concept_images[one] @ concept_images[other]) for other in range(5) if other != one}
        nearest = max(cosines, key=lambda other: cosines[other])
        assert found.index[one] == nearest
        assert found.similarity[one] == pytest.approx(cosines[nearest], abs=1e-12)


def test_an_honest_image_is_as_near_as_a_held_out_concept_image_on_average():
    """The fair mean: were the images concept images of the same kind, its expectation would be the held-out one's."""
    draws = np.stack([rows(5, 3, seed) for seed in range(4000)])
    held = np.mean([copying.held_out(concept_images[:4]).similarity.mean() for concept_images in draws])
    one_left_out, plain = (
        np.mean([getattr(copying.nearest(p[4:], p[:4]), name)[0] for p in draws])
        for name in ("with_one_left_out", "similarity")
    )
    assert one_left_out == pytest.approx(held, abs=0.01)
    assert plain > held + 0.05  # with one concept image more to choose from


def test_a_single_concept_image_cannot_be_left_out():
    found = copying.nearest(rows(3, 4, 0), rows(1, 4, 1))
    assert found.with_one_left_out is None and found.index.tolist() == [0, 0, 0]


def test_pixels_tell_a_copy_from_another_image_and_do_not_mind_brightness():
    random = np.random.default_rng(0)
    one, other = (random.integers(40, 200, (32, 32, 3), dtype=np.uint8) for _ in range(2))
    images = [Image.fromarray(pixels) for pixels in (one, one + 20, other, np.full_like(one, 9))]
    features = copying.pixel_features(images)
    expected = np.corrcoef(one.ravel().astype(float), other.ravel().astype(float))[0, 1]
    assert features[0] @ features[1] == pytest.approx(1.0)
    assert features[0] @ features[2] == pytest.approx(expected, abs=1e-9)
    assert not features[3].any()  # of one colour: no pattern to copy


def test_a_nearest_pair_is_headed_by_its_cosine_and_its_prompt(monkeypatch):
    drawn: list = []
    monkeypatch.setattr(copying, "comparison_grid", lambda *given: drawn.append(given))
    copying.save_pairs([(Path("a.png"), Path("b.png"), 0.9321, "a photo of a dog")], Path("pairs.png"), "ViCo")
    assert drawn[0][2] == ["cosine 0.932: a photo of a dog"]


# Diversity


def test_diversity_is_the_mean_over_pairs():
    features = rows(6, 4, 3)
    pairs = [1 - float(a @ b) for a, b in itertools.combinations(features, 2)]
    assert diversity.mean_pairwise_distance(features) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert diversity.mean_pairwise_distance(np.repeat(features[:1], 3, axis=0)) == pytest.approx(0, abs=1e-12)


def test_an_image_in_which_nothing_is_found_is_unlike_all_others_and_no_image_of_the_vendi_score():
    bare, one = np.zeros((1, 4)), rows(1, 4, 3)
    for some in (np.concatenate([bare, bare]), np.concatenate([bare, one])):
        assert diversity.mean_pairwise_distance(some) == pytest.approx(1)
    others = rows(3, 4, 3)
    pairs = [1 - float(a @ b) for a, b in itertools.combinations(np.concatenate([others, bare]), 2)]
    assert diversity.mean_pairwise_distance(np.concatenate([others, bare])) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert diversity.vendi_score(np.concatenate([bare, np.eye(4)[:2]])) == pytest.approx(2)
    assert diversity.vendi_score(bare) == 0
    assert drift.feature_distances(np.concatenate([bare, one]), np.concatenate([bare, bare])).tolist() == [0, 1]


def test_one_image_has_no_diversity():
    with pytest.raises(ValueError, match="two images at least"):
        diversity.mean_pairwise_distance(rows(1, 4, 0))


def test_the_vendi_score_is_the_effective_number_of_images():
    """Against the singular values of the features, which need no kernel, and sets whose number is known."""
    features = rows(6, 4, 3)
    shares = [value**2 / 6 for value in np.linalg.svd(features, compute_uv=False)]
    assert sum(shares) == pytest.approx(1)
    naive = np.prod([share**-share for share in shares])
    assert diversity.vendi_score(features) == pytest.approx(naive, abs=1e-9)
    assert diversity.vendi_score(np.repeat(features[:1], 5, axis=0)) == pytest.approx(1, abs=1e-6)
    assert diversity.vendi_score(np.eye(5)) == pytest.approx(5)
    many = rows(6, 4, 3)[:, :2] / np.linalg.norm(rows(6, 4, 3)[:, :2], axis=1, keepdims=True)  # more rows than columns
    shares = np.linalg.eigvalsh(many @ many.T / 6)[-2:]
    assert diversity.vendi_score(many) == pytest.approx(np.prod(shares**-shares), abs=1e-9)
    assert diversity.vendi_score(np.repeat(np.eye(3), 2, axis=0)) == pytest.approx(3)


# Drift


def test_drift_prompts_never_mention_the_concept_and_name_three_different_things():
    templates = ["a photo of a {}", "a {} on the beach", "{} at night", "a {} in snow", "a {} left out"]
    asked = drift.asked_prompts(templates, "cat")
    assert len(asked) == 12 and not any("<" in prompt or "{}" in prompt for prompt, _ in asked)
    assert asked[0] == ("a photo of a cat", "class noun") and asked[4] == ("a photo of a car", "other noun")
    assert [kind for _, kind in asked].count("class noun") == 4
    assert not any("left out" in prompt for prompt, _ in asked)
    assert len({prompt for prompt, _ in drift.asked_prompts(templates, "teddy bear")}) == 12


def test_images_that_are_the_same_do_not_differ_and_others_by_the_root_mean_square():
    random = np.random.default_rng(1)
    one, other = (random.integers(0, 256, (3, 4, 5, 3), dtype=np.uint8) for _ in range(2))
    assert not drift.pixel_differences(one, one).any()
    for n, found in enumerate(drift.pixel_differences(one, other)):
        squares = [(int(a) / 255 - int(b) / 255) ** 2 for a, b in zip(one[n].ravel(), other[n].ravel(), strict=True)]
        assert found == pytest.approx((sum(squares) / len(squares)) ** 0.5)
    black, white = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    assert drift.pixel_differences(black, white)[0] == 1
    a, b = rows(4, 6, 0), rows(4, 6, 1)
    assert drift.feature_distances(a, b) == pytest.approx([1 - float(x @ y) for x, y in zip(a, b, strict=True)])
    assert drift.feature_distances(a, a) == pytest.approx([0] * 4, abs=1e-12)


# Absence


def test_the_threshold_is_the_best_of_all_places_between_two_images():
    random = np.random.default_rng(4)
    for _ in range(50):
        without, with_concept = random.normal(0.4, 0.1, 12), random.normal(0.6, 0.1, 7)
        place, accuracy = absence.threshold(without, with_concept)
        everything = sorted([*without, *with_concept])
        middles = [(low + high) / 2 for low, high in itertools.pairwise(everything)]

        def right(at: float, without=without, with_concept=with_concept) -> float:
            return (float((without < at).mean()) + float((with_concept >= at).mean())) / 2

        assert accuracy == pytest.approx(max(right(middle) for middle in middles))
        assert right(place) == pytest.approx(accuracy)


def test_of_several_best_places_the_widest_gap_is_taken():
    place, accuracy = absence.threshold(np.array([0.1, 0.5]), np.array([0.2, 0.9]))  # 0.15 is as good as 0.7
    assert place == pytest.approx(0.7) and accuracy == 0.75
    assert absence.threshold(np.array([0.5, 0.5]), np.array([0.5])) == (0.5, 0.5)


# Prompt by prompt


def table(variant: str, scores: dict[tuple[int, int], float]) -> pl.DataFrame:
    about = {"base_model": "m", "concept": "rex", "method": variant, "variant": variant, "metric": "dino"}
    about |= {"encoder": "e", "encoder_sha256": "0" * 64, "preprocessing": "p", "image_sha256": "1" * 64}
    about |= {"headline": True, "pairs": 1}
    return tables.from_rows(
        about | {"prompt_index": p, "prompt": f"{{}} {p}", "image_index": i, "image": f"{p}_{i}.png", "score": score}
        for (p, i), score in scores.items()
    )


def test_each_prompts_mean_and_its_difference_from_the_base_models_images_of_the_same_noise():
    mine = table("oft", {(0, 0): 0.5, (0, 1): 0.7, (1, 0): 0.9})
    baseline = table("base_model", {(0, 0): 0.4, (0, 1): 0.2})
    first, second = per_prompt.breakdown(mine, baseline)
    assert first["prompt"] == "{} 0" and first["images"] == 2
    assert (first["mean"], first["least"], first["greatest"]) == pytest.approx((0.6, 0.5, 0.7))
    assert first["difference"] == pytest.approx(((0.5 - 0.4) + (0.7 - 0.2)) / 2)
    assert second["mean"] == 0.9 and second["difference"] is None  # the base model has none there
    assert all(row["difference"] is None for row in per_prompt.breakdown(mine, None))


# What they hand back


def test_a_number_that_is_not_finite_enters_no_table(tmp_path):
    findings = Findings(tmp_path, "T", "how")
    meanings = {"name": "of it", "value": "its value; null where there is none"}
    good = [{"name": "a", "value": 0.5}, {"name": "b", "value": None}]
    findings.table("good.parquet", good, meanings, "two")
    assert parquet.meanings_in(tmp_path / "good.parquet") == meanings
    assert parquet.read_parquet(tmp_path / "good.parquet").to_dicts() == good
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="column 'value' holds a number that is not finite"):
            findings.table("bad.parquet", [{"name": "a", "value": wrong}], meanings, "one")
    with pytest.raises(ValueError, match="has the columns"):
        findings.table("bad.parquet", [{"name": "a"}], meanings, "one")
    assert not (tmp_path / "bad.parquet").exists() and list(findings.tables) == ["good.parquet"]
    with pytest.raises(RuntimeError, match="wrote files before"):
        findings.not_defined("it learns nothing")
    assert Findings(tmp_path, "T", "h").not_defined("why")["not_defined"] == "why"


# By the kind of prompt


@pytest.mark.parametrize(
    ("kind", "templates"),
    [
        ("style", ["a painting of a {}", "A {} latte art", "App icon of a {}", "a red {} in the style of Monet"]),
        ("property", ["a red {}", "a cube shaped {}", "a shiny {} on a table", "A {} made out of pure gold"]),
        (
            "recontextualization",
            ["a photo of a {}", "a {} wearing a red hat", "a {} with a blue house behind"],
        ),
    ],
)
def test_what_a_prompt_asks_for_is_seen_by_its_words(kind, templates):
    assert [per_kind.kind_of(template) for template in templates] == [kind] * len(templates)


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        ("A {} presenting a poster at a conference with people around", "recontextualization"),
        ("a poster of a {}", "style"),
        ("a {} painted like a Picasso abstract", "style"),
        ("a {} depicted with rough, textured brushstrokes", "style"),
        ("a {} reimagined as a character from a classic fairy tale", "property"),
        ("a {} with intricate Baroque carvings", "property"),
        ("a cake with cream shaped like a {} on top", "recontextualization"),
    ],
)
def test_prompts_of_the_lists_whose_words_mislead(template, kind):
    assert per_kind.kind_of(template) == kind


def test_of_dreambooths_prompts_for_things_the_properties_are_those_of_its_last_rows():
    """Its list ends with five colours and states; all before them are scenes."""
    prompts = read_list(Path(__file__).parents[2] / "data" / "prompts" / "dreambooth_object.txt")
    kinds = [per_kind.kind_of(prompt) for prompt in prompts]
    assert kinds == ["recontextualization"] * 20 + ["property"] * 5


def test_each_kinds_mean_and_its_differences_are_those_of_loops():
    prompts = ["a {} on the beach", "a red {}", "a {} in the snow"]
    draw = np.random.default_rng(3)

    def table(variants):
        return pl.DataFrame(
            [
                {
                    **{"variant": variant, "metric": "dino", "encoder": "e", "prompt_index": p, "prompt": prompt},
                    **{"image_index": image, "score": float(draw.normal())},
                }
                for variant in variants
                for p, prompt in enumerate(prompts)
                for image in range(2)
            ]
        )

    scores, baseline = table(["plain", "lagged"]), table(["base_model"])
    every = [*scores.to_dicts(), *baseline.to_dicts()]
    at = {(row["variant"], row["prompt_index"], row["image_index"]): row["score"] for row in every}
    found = per_kind.breakdown(scores, baseline, "plain")
    assert [(row["variant"], row["kind"]) for row in found] == [
        (variant, kind) for variant in ("lagged", "plain") for kind in ("recontextualization", "property")
    ]
    for row in found:
        cells = [(p, image) for p in ([0, 2] if row["kind"] == "recontextualization" else [1]) for image in (0, 1)]
        own = [at[row["variant"], *cell] for cell in cells]
        assert (row["prompts"], row["images"]) == (len(cells) // 2, len(cells))
        assert row["mean"] == pytest.approx(np.mean(own))
        for column, other in (("difference", "base_model"), ("over_first", "plain")):
            expected = np.mean([value - at[other, *cell] for value, cell in zip(own, cells, strict=True)])
            assert row[column] == pytest.approx(expected, abs=1e-12)
    assert {row["difference"] for row in per_kind.breakdown(scores, None, "plain")} == {None}


def test_kinds_are_shown_where_the_list_has_several(tmp_path):
    scores = table("oft", {(0, 0): 0.5, (1, 0): 0.9}).with_columns(prompt=pl.Series(["a {} at sea", "a red {}"]))
    grid = SimpleNamespace(templates=["a {} at sea", "a red {}"], variants=["oft"])
    about: dict[str, Any] = {"scores": scores, "baseline_scores": None, "made_elsewhere": False, "grid": grid}
    inputs: Any = SimpleNamespace(concept=SimpleNamespace(name="rex"), method="oft", **about)
    findings = Findings(tmp_path, per_kind.TITLE, per_kind.HOW)
    per_kind.analyse(inputs, findings)
    assert parquet.read_parquet(tmp_path / "per_kind.parquet")["kind"].to_list() == ["recontextualization", "property"]
    with Image.open(tmp_path / "per_kind_scores.png") as image:
        assert image.width > 200
    grid.templates = ["a {} at sea"]
    with pytest.raises(NotDefined, match="all prompts are of one kind, recontextualization"):
        per_kind.analyse(inputs, findings)


# Object masks


class Attending:
    """Sees the left half of its first concept image, and all of its second."""

    config = SimpleNamespace(preprocessing=Preprocessing("squash", "bicubic", flip=False))

    def say(self, template: str) -> str:
        return template.replace("{}", "<rex> dog")

    def object_masks(self, base: Any, prompt: str, t: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert (prompt, t) == ("a photo of a <rex> dog", 500)
        left = torch.tensor([[True, False], [True, False]]).flatten()
        return torch.zeros(2, 4, 2, 2), {"up": torch.stack([left, torch.ones(4, dtype=torch.bool)])}


def test_the_columns_of_masks_are_told_apart_in_few_letters():
    masks = {f"up_blocks.2.attentions.{n}.image": torch.zeros(3, side * side) for n, side in ((1, 8), (2, 16))}
    assert object_masks._heads(masks) == ["layer 1, 8 x 8", "layer 2, 16 x 16"]


def test_object_masks_are_shown_on_the_concept_images_and_their_shares_counted(tmp_path, monkeypatch):
    drawn, draw = [], object_masks.comparison_grid
    monkeypatch.setattr(object_masks, "comparison_grid", lambda *given: drawn.append(given) or draw(*given))
    base = SimpleNamespace(decode=lambda latents: torch.full((len(latents), 8, 8, 3), 200, dtype=torch.uint8))
    inputs: Any = SimpleNamespace(trained=Attending(), base=base, concept=Concept("rex", "<rex>", "dog"))
    inputs.concept_images = [tmp_path / "0.jpg", tmp_path / "1.jpg"]
    findings = Findings(tmp_path, object_masks.TITLE, object_masks.HOW)
    object_masks.analyse(inputs, findings)
    table = parquet.read_parquet(tmp_path / "object_masks.parquet")
    assert table["share"].to_list() == [0.5, 1.0] and table["on_concept"].to_list() == [None, None]
    assert findings.absent == {"share on the concept": object_masks.NO_MASKS}
    assert list(drawn[0][1]) == ["concept image 1", "concept image 2"], "as people count"
    assert findings.metrics == {"share inside, up": 0.75} and (tmp_path / "object_masks.png").is_file()
    shown = np.asarray(object_masks.darkened(np.full((8, 8, 3), 200, np.uint8), torch.tensor([True, False] * 2)))
    assert (shown[:, :4] == 200).all() and (shown[:, 4:] == 40).all()
    inputs.trained = object()
    with pytest.raises(NotDefined, match="attends to no concept image"):
        object_masks.analyse(inputs, Findings(tmp_path, object_masks.TITLE, object_masks.HOW))


def test_of_several_objects_the_concepts_own_masks_say_how_much_of_what_is_seen_is_the_concept(tmp_path):
    """In a wide image of two things, of which the concept is the left or the right one, squashed to a square."""
    (tmp_path / "masks").mkdir()
    inputs: Any = SimpleNamespace(trained=Attending(), concept=Concept("rex", "<rex>", "dog"))
    inputs.base = SimpleNamespace(decode=lambda latents: torch.full((len(latents), 8, 8, 3), 200, dtype=torch.uint8))
    inputs.concept_images, inputs.trained_on_these = [tmp_path / "0.png", tmp_path / "1.png"], True
    left = np.zeros((16, 32), np.uint8)
    left[:, :8] = 255  # a quarter
    for path, own in zip(inputs.concept_images, (left, 255 - left), strict=True):
        Image.new("RGB", (32, 16)).save(path)
        Image.fromarray(own).save(tmp_path / "masks" / path.name)
    findings = Findings(tmp_path, object_masks.TITLE, object_masks.HOW)
    object_masks.analyse(inputs, findings)
    table = parquet.read_parquet(tmp_path / "object_masks.parquet")
    # of the first the left half is seen, of which the concept is a half; of the second everything
    for column, expected in (("concept_share", [0.25, 0.75]), ("on_concept", [0.5, 0.75]), ("of_concept", [1.0, 1.0])):
        assert table[column].to_list() == pytest.approx(expected, abs=0.03), column
    assert findings.metrics["share on the concept, up"] == pytest.approx(0.625, abs=0.03) and not findings.absent
    inputs.trained_on_these = False  # as many, but others
    object_masks.analyse(inputs, changed := Findings(tmp_path, object_masks.TITLE, object_masks.HOW))
    assert changed.absent == {"share on the concept": object_masks.CHANGED}
    assert set(parquet.read_parquet(tmp_path / "object_masks.parquet")["on_concept"].to_list()) == {None}
